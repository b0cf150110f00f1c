"""Prototypical part networks on the patches of a frozen ViT; each class has prototypes of its own.

    python train.py --method protopnet    # Chen et al. 2019, arXiv 1806.10574
    python train.py --method huang        # Huang et al. 2023, arXiv 2212.05946
    python train.py --method tesnet       # Wang et al., ICCV 2021
    python train.py --method protopool    # Rymarczyk et al., ECCV 2022, arXiv 2112.02902

Letters in shapes are those of model.py; m is the number of prototypes of a class, d their width,
P the number of all prototypes: C m, or those of ProtoPool's pool, which the classes share.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from model import Output, to_float32, tune_backbone


# ---------------------------------------------------------------- the losses of all four
# distance (B, N, P): of N patches to P prototypes; own (B, P): is a prototype of the image's class?

def cluster(distance, own):
    """Clst: every image has a patch near a prototype of its class. Mean smallest distance."""
    return distance.amin(1).masked_fill(~own, math.inf).amin(1).mean()


def separation(distance, own):
    """Sep: no patch is near a prototype of another class. Minus the mean smallest distance."""
    return -distance.amin(1).masked_fill(own, math.inf).amin(1).mean()


# ---------------------------------------------------------------- what all four share

class ClassPrototypes(nn.Module):
    """An image is of a class because its patches look like that class's prototypes.

        z = A e of a patch e        similarity_j = s cos(z, p_j), with a learnt s
        score_j = max over patches of similarity_j        logits = W score

    The maps shown are those of the image's own class, so concept j is another one in every class.
    Output.attention holds similarities, not shares. The background map is 0: it wins the patches
    that point away from all prototypes of the class.

    What differs from the papers, in all four methods: they train a CNN along; our ViT is frozen.
    Their add-on layers end in a sigmoid, so all z lie in one corner and the frozen patches of
    different birds look alike. ProtoPNet and ProtoPool also take the logarithm of a distance.
    With one linear layer, the cosine and a scale the prototypes train on frozen patches.
    """

    class_specific = True

    def __init__(self, backbone, num_classes, per_class=10, width=128, tune="none", pool=None):
        super().__init__()
        tune_backbone(backbone, tune)
        self.backbone = backbone
        self.tune = tune
        self.grid = backbone.grid
        self.num_classes = num_classes
        self.per_class = per_class
        self.prototypes = (per_class + 1,)  # how many; they themselves are in vectors
        self.last_only = False
        P = pool or num_classes * per_class
        self.add_on = nn.Linear(backbone.width, width)  # A
        self.vectors = nn.Parameter(torch.randn(P, width))  # p, of any length
        self.log_scale = nn.Parameter(torch.tensor(3.0).log())
        own = torch.eye(num_classes).repeat_interleave(per_class, 1)  # (C, C m), 1: own class
        self.register_buffer("own", own, persistent=False)
        self.last = nn.Parameter(1.5 * own - 0.5)  # W: 1 to the own class, -1/2 to others

    def patches(self, images):
        """images -> patches e (B, N, D) and those of an early block, (B, N, D)."""
        blocks, prefix = self.backbone.blocks, self.backbone.prefix
        learns = self.tune != "none" and not self.last_only
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            tokens = self.backbone.embed(images)
            for l, block in enumerate(blocks):
                tokens = block(tokens)
                if l == len(blocks) // 4:
                    shallow = tokens[:, prefix:].detach()
            return self.backbone.norm(tokens[:, prefix:]), shallow

    def unit_vectors(self):
        return F.normalize(self.vectors, dim=1)

    def compare(self, e):
        """Patches e (B, N, D) -> z (B, N, d), cosines (B, N, P)."""
        z = to_float32(self.add_on(e))
        with torch.autocast(z.device.type, enabled=False):
            cosines = F.normalize(z, dim=2) @ self.unit_vectors().T
        return z, cosines

    def similarity(self, cosines):
        return self.log_scale.exp() * cosines

    def scores(self, similarity):
        """similarity (B, N, P) -> (B, C m)."""
        return similarity.amax(1)

    def maps(self, similarity, labels):
        """similarity (B, N, P) -> that to the labels' prototypes, (B, m, N)."""
        by_class = similarity.unflatten(2, (self.num_classes, self.per_class))
        each = torch.arange(len(labels), device=labels.device)
        return by_class[each, :, labels].transpose(1, 2)

    def owned(self, labels):
        """labels (B) -> (B, P): is a prototype of the class?"""
        return self.own[labels].bool()

    def class_weights(self):
        """W (C, C m): what a prototype's score adds to a class's logit."""
        return self.last if self.last_only else self.last.detach()

    def read(self, cosines, labels=None):
        """cosines (B, N, P) -> Output with the maps of the labels' prototypes (None: predictions').

        The mean of concept_logits is what those prototypes add to the logits. The rest comes from
        the prototypes of other classes.
        """
        W = self.class_weights()
        with torch.autocast(cosines.device.type, enabled=False):  # bf16 rounds classes together
            similarity = self.similarity(cosines)
            scores = self.scores(similarity)
            logits = scores @ W.T
            if labels is None:
                labels = logits.argmax(1)
            maps = self.maps(similarity, labels)
        background = torch.zeros_like(maps[:, :1])
        maps = torch.cat([maps, background], dim=1).unflatten(2, self.grid)
        votes = scores[:, None] * W  # (B, C, C m), to a class, of a prototype
        votes = votes.unflatten(2, (self.num_classes, self.per_class))
        each = torch.arange(len(labels), device=labels.device)
        concept_logits = self.per_class * votes[each, :, labels].transpose(1, 2)  # (B, m, C)
        features = self.vectors.expand(len(cosines), -1, -1)
        return Output(logits, concept_logits, [maps], [], [], features)

    def forward(self, images, labels=None):
        """images (B, 3, H, W), labels (B) of the prototypes to show -> Output, see read."""
        e, _ = self.patches(images)
        _, cosines = self.compare(e)
        return self.read(cosines, labels)

    def losses(self, images, labels):
        e, shallow = self.patches(images)
        z, cosines = self.compare(e)
        logits = self.read(cosines, labels).logits
        losses = {"classification": F.cross_entropy(logits, labels)}
        if self.last_only:
            losses["last_layer"] = 1e-4 * (self.last * (1 - self.own)).abs().sum()
        else:
            with torch.autocast(z.device.type, enabled=False):
                losses |= self.map_losses(z, shallow, cosines, labels)
        return losses, logits

    def map_losses(self, z, shallow, cosines, labels):
        own = self.owned(labels)
        distance = self.distance(cosines)
        return {
            "cluster": 0.8 * cluster(distance, own),
            "separation": 0.08 * separation(distance, own),
        }

    def distance(self, cosines):
        """The squared distance of points on the unit sphere."""
        return 2 - 2 * cosines

    def parameter_groups(self, args):
        backbone_rate = args.lr_backbone if self.tune == "all" else args.lr_prototypes
        learners = [*self.add_on.parameters(), self.vectors, self.log_scale]
        return [
            dict(params=[self.last], lr=args.lr),
            dict(params=learners, lr=args.lr_prototypes),
            dict(params=self.backbone.parameters(), lr=backbone_rate),  # frozen unless tuned
        ]


# ---------------------------------------------------------------- ProtoPNet

class ProtoPNet(ClassPrototypes):
    """ProtoPNet, in two stages.

        1. A, s and the prototypes learn: cross entropy + 0.8 Clst + 0.08 Sep (section 2.2), with
           the squared distances |z - p|^2 = 2 - 2 cos(z, p) of unit vectors.
        Then every prototype is projected onto the nearest patch of its class's training images.
        2. W alone learns: cross entropy + 1e-4 times the L1 norm of its weights to other classes.

    The paper's z is sigmoid(A2 relu(A1 e)), its similarity log((d2 + 1) / (d2 + 1e-4)). It projects
    every ten epochs and then trains all layers again; we project once.
    """

    rates = dict(lr=1e-3, lr_prototypes=3e-3)

    def last_stage_begins(self, epochs):
        """Five epochs before the end, or half of a short run; a single epoch has no last stage."""
        return epochs - min(5, epochs // 2)

    def set_epoch(self, epoch, epochs):
        self.last_only = epoch >= self.last_stage_begins(epochs)

    def scores(self, similarity):
        scores = super().scores(similarity)
        return scores.detach() if self.last_only else scores

    def after_epoch(self, epoch, epochs, dataset):
        if epoch + 1 == self.last_stage_begins(epochs):
            self.project(dataset)

    @torch.no_grad()
    def project(self, dataset):
        """Every prototype becomes the nearest patch of its class's images: one can look at it.

        dataset: the training images in the test view. Prototypes of a class without images stay.
        Returns the patches (P, D), before A; those of prototypes that stay are 0.
        """
        self.eval()
        P, device = len(self.vectors), self.vectors.device
        best = torch.full((P,), -math.inf, device=device)
        nearest = torch.zeros(P, self.backbone.width, device=device)  # patches e
        for images, labels, *_ in DataLoader(dataset, 16):
            e, _ = self.patches(images.to(device))
            _, cosines = self.compare(e)
            own = self.owned(labels.to(device))[:, None]  # (B, 1, P)
            cosines = cosines.masked_fill(~own, -math.inf).flatten(0, 1)
            highest, index = cosines.max(0)  # (P), over the patches of the batch
            closer = highest > best
            best = torch.where(closer, highest, best)
            nearest = torch.where(closer[:, None], e.flatten(0, 1)[index], nearest)
        found = best > -math.inf
        self.vectors[found] = self.add_on(nearest[found])
        return nearest


# ---------------------------------------------------------------- bases: TesNet and Huang et al.
# bases (C, m, d): the prototypes of a class, of unit length, span its subspace.

def orthonormality(bases):
    """Sum over classes of the entries of |B_c B_c^T - I|, B_c (m, d)."""
    gram = bases @ bases.transpose(1, 2)  # (C, m, m)
    identity = torch.eye(gram.shape[1], device=gram.device)
    return (gram - identity).abs().sum()


def subspace_separation(bases):
    """Minus the sum over pairs of classes of |B_c^T B_c - B_k^T B_k|_F / sqrt(2).

    |X - Y|_F^2 = tr XX + tr YY - 2 tr XY, and tr(B_c^T B_c B_k^T B_k) = |B_c B_k^T|_F^2: there is
    no need of a d x d matrix for every pair.
    """
    C, m, _ = bases.shape
    rows = bases.flatten(0, 1)
    traces = (rows @ rows.T).square().view(C, m, C, m).sum((1, 3))  # (C, C)
    c, k = torch.triu_indices(C, C, 1, device=bases.device)
    squares = traces[c, c] + traces[k, k] - 2 * traces[c, k]
    return -(squares / 2).clamp_min(1e-10).sqrt().sum()


class TesNet(ProtoPNet):
    """TesNet: the prototypes of a class are an orthonormal basis of its subspace.

        Stage 1: cross entropy + 0.8 Clst + 0.08 Sep, both with the distance -cos(z, p)
                 + 1e-4 orthonormality of every basis - 1e-7 distance of every two subspaces.
    Projection and stage 2 are ProtoPNet's.

    The paper's score is <z, p>, p of unit length, ours s <z, p> / |z|. It renormalises p after
    every step; we normalise in the forward. The bases start orthonormal; the authors' start at
    random positive numbers. Their program trains W and penalises it in stage 1, too.
    """

    rates = dict(lr=1e-3, lr_prototypes=3e-3)

    def __init__(self, backbone, num_classes, per_class=10, width=128, tune="none"):
        super().__init__(backbone, num_classes, per_class, width, tune)
        for basis in self.vectors.data.split(per_class):
            nn.init.orthogonal_(basis)

    def distance(self, cosines):
        return -cosines

    def map_losses(self, z, shallow, cosines, labels):
        losses = super().map_losses(z, shallow, cosines, labels)
        bases = self.unit_vectors().unflatten(0, (self.num_classes, self.per_class))
        losses["orthonormality"] = 1e-4 * orthonormality(bases)
        losses["subspaces"] = 1e-7 * subspace_separation(bases)
        return losses


# ---------------------------------------------------------------- Huang et al.

def alignment(z, shallow, peaks, slack=0.1):
    """Shallow-deep feature alignment of z (B, N, d) with an early block (B, N, D); peaks (B, m).

    Where a prototype of the class matches best, the patch should resemble the other patches as
    much as it does in the early block: mean excess of |difference of cosines| over the slack.
    """
    difference = peak_cosines(z, peaks) - peak_cosines(shallow, peaks)
    return F.relu(difference.abs() - slack).mean()


def peak_cosines(e, peaks):
    """Cosines of the patches e (B, N, D) with those at the peaks (B, m): (B, m, N)."""
    e = F.normalize(to_float32(e), dim=2)
    index = peaks[..., None].expand(-1, -1, e.shape[2])
    at_peaks = e.gather(1, index)  # (B, m, D)
    return at_peaks @ e.transpose(1, 2)


class Huang(ClassPrototypes):
    """Huang et al.: TesNet's bases without projection, last stage and subspace separation.

    Score aggregation: scores count for their own class alone. Their weights are learnt, positive
    and sum to m: W_cj = m softmax_j(w_c). Shallow-deep feature alignment has the weight 0.3.

    The paper aligns the last map of a backbone that is trained; ours is frozen, so z is aligned.
    Its alignment sets in after five epochs, ours at once. Its score is TesNet's, see there.
    """

    # lr, that of w, is the authors'.
    rates = dict(lr=1e-6, lr_prototypes=3e-3)

    def __init__(self, backbone, num_classes, per_class=10, width=128, tune="none"):
        super().__init__(backbone, num_classes, per_class, width, tune)
        self.last = nn.Parameter(torch.zeros(num_classes, per_class))  # w

    def class_weights(self):
        return self.own * (self.per_class * self.last.softmax(1)).flatten()

    def distance(self, cosines):
        return -cosines

    def map_losses(self, z, shallow, cosines, labels):
        losses = super().map_losses(z, shallow, cosines, labels)
        bases = self.unit_vectors().unflatten(0, (self.num_classes, self.per_class))
        losses["orthonormality"] = 1e-4 * orthonormality(bases)
        peaks = self.maps(cosines, labels).argmax(2)  # (B, m)
        losses["alignment"] = 0.3 * alignment(z, shallow, peaks)
        return losses


# ---------------------------------------------------------------- ProtoPool

class ProtoPool(ProtoPNet):
    """ProtoPool: all classes share a pool of prototypes, each class fills ten slots from it.

        q = Gumbel-softmax over the pool of (sharpness * slot's logits), temperature 1/2
        g_p = max over patches of similarity_p - mean over patches        (focal similarity)
        score of a slot = sum over the pool of q_p g_p,    W: 1 to the slot's class, 0 to others
        1. Cross entropy + 0.8 Clst + 0.08 Sep + mean over the slots of a class's sum of cosines
           with its other slots. Own are the ten prototypes of largest share. The sharpness grows
           up to 1000, as the square root of the epoch; later, and in eval mode, q is one-hot.
        Then every prototype that a class has taken is projected, as in ProtoPNet.
        2. W learns, with 1e-4 times the L1 norm of its weights to other classes, and so does A:
           a prototype stays the patch e_p of an image, since the ViT is frozen, so p = A e_p.

    In the paper W alone learns in stage 2. Here that does not make up for the projection, 48 to
    58 % on the validation split; with A, over half of the run, 63 to 69. Their program mixes
    distances, then takes logarithms; ours mixes similarities. Its cosines of slots are those of the
    logits; the paper's, like ours, those of q. It has mixup, and slots at the prototypes' rate.
    """

    rates = dict(lr=2e-2, lr_prototypes=1e-2)

    def __init__(self, backbone, num_classes, per_class=10, width=128, tune="none", pool=202):
        super().__init__(backbone, num_classes, per_class, width, tune, pool)
        self.slots = nn.Parameter(0.02 * torch.randn(num_classes, per_class, pool))
        self.last = nn.Parameter(self.own.clone())  # W
        self.register_buffer("sources", torch.zeros(pool, backbone.width))  # e_p
        self.sharpness = 1000.0

    def last_stage_begins(self, epochs):
        return epochs - epochs // 2

    def set_epoch(self, epoch, epochs):
        super().set_epoch(epoch, epochs)
        progress = (epoch + 1) / self.last_stage_begins(epochs)
        self.sharpness = 1000 * min(1, progress) ** 0.5

    def assignment(self):
        """q (C, m, P): what a slot takes from the pool. Soft and random only while it learns."""
        if self.training and not self.last_only:
            return F.gumbel_softmax(self.sharpness * self.slots, tau=0.5, dim=2)
        return F.one_hot(self.slots.argmax(2), len(self.vectors)).float()

    def compare(self, e):
        self.q = self.assignment()  # one draw a forward
        return super().compare(e)

    def unit_vectors(self):
        if self.last_only:
            return F.normalize(to_float32(self.add_on(self.sources)), dim=1)
        return super().unit_vectors()

    def similarity(self, cosines):
        return super().similarity(cosines - cosines.mean(1, keepdim=True))

    def scores(self, similarity):
        return similarity.amax(1) @ self.q.flatten(0, 1).T

    def maps(self, similarity, labels):
        return self.q[labels] @ similarity.transpose(1, 2)

    def owned(self, labels):
        shares = self.q.detach().sum(1)  # (C, P)
        largest = shares.topk(self.per_class, dim=1).indices
        own = torch.zeros_like(shares).scatter(1, largest, 1.0)
        return (own * shares).bool()[labels]  # equal slots take fewer than ten

    def map_losses(self, z, shallow, cosines, labels):
        losses = super().map_losses(z, shallow, cosines, labels)
        q = F.normalize(self.q, dim=2)
        cosines_of_slots = q @ q.transpose(1, 2)  # (C, m, m)
        losses["slots"] = cosines_of_slots.sum(2).mean() - 1  # without a slot's own
        return losses

    def project(self, dataset):
        self.sources.copy_(super().project(dataset))

    @torch.no_grad()
    def after_epoch(self, epoch, epochs, dataset):
        super().after_epoch(epoch, epochs, dataset)
        if self.last_only:
            self.vectors.copy_(self.add_on(self.sources))

    def parameter_groups(self, args):
        slots = dict(params=[self.slots], lr=0.3 * args.lr_prototypes)
        return [*super().parameter_groups(args), slots]
