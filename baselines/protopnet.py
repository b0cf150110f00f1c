"""Prototypical part networks: patches of a frozen ViT are compared with prototypes of classes.

    python train.py --method protopnet    # Chen et al. 2019, arXiv 1806.10574
    python train.py --method huang        # Huang et al. 2023, arXiv 2212.05946
    python train.py --method tesnet       # Wang et al., ICCV 2021
    python train.py --method protopool    # Rymarczyk et al., ECCV 2022, arXiv 2112.02902

Letters in shapes are those of model.py; m is the number of prototypes of a class, d their width.
P is the number of all prototypes: C m, or the size of the pool that ProtoPool's classes share.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from model import Output, to_float32, tune_backbone


# ---------------------------------------------------------------- two losses of all four methods
# distance (B, N, P): from every patch to every prototype.
# own (B, P): whether a prototype is one of the image's class.

def cluster(distance, own):
    """Clst: the smallest distance from a patch to an own prototype, mean over the images."""
    nearest = distance.amin(1)  # (B, P), over the patches
    return nearest.masked_fill(~own, math.inf).amin(1).mean()


def separation(distance, own):
    """Sep: minus the smallest distance from a patch to a prototype that is not own, mean."""
    nearest = distance.amin(1)
    return -nearest.masked_fill(own, math.inf).amin(1).mean()


# ---------------------------------------------------------------- what all four share

class ClassPrototypes(nn.Module):
    """An image is of the class whose prototypes its patches resemble.

        z = A e of a patch e, A affine        similarity_j = s cos(z, p_j), with a learnt s
        score_j = max over patches of similarity_j        logits = W score

    The steps: patches, compare, similarity, scores, maps; read makes an Output of them. A method
    overrides the steps that its paper changes.

    The maps are similarities to the prototypes of the image's own class, not shares. Concept j
    differs from class to class. The background map is 0: it wins where all others are negative.

    All four methods differ from their papers: those train a CNN along, our ViT is frozen, in stage
    2 even with --tune. Their add-on layers end in a sigmoid, which leaves all z in one corner of
    the space; ProtoPNet and ProtoPool take the logarithm of a distance. Neither trains well on
    frozen patches. One linear layer, the cosine and a scale do. In the papers Clst weighs 0.8. Here
    0.2 is better by one or two points (cached patches of the validation split).
    """

    class_specific = True
    per_class = 10  # m
    width = 128  # d; programs on CUB: 64 (TesNet, Huang), 256 (ProtoPool)
    pool = None  # P where classes share prototypes

    def __init__(self, backbone, num_classes, tune="none"):
        super().__init__()
        tune_backbone(backbone, tune)
        self.backbone = backbone
        self.tune = tune
        self.grid = backbone.grid
        self.num_classes = num_classes
        self.prototypes = (self.per_class + 1,)  # number of maps, with the background
        self.stage = 1  # of training; only ProtoPNet and its subclasses have a second
        P = self.pool or num_classes * self.per_class
        self.add_on = nn.Linear(backbone.width, self.width)  # A
        self.vectors = nn.Parameter(torch.randn(P, self.width))  # p, of any length
        self.log_scale = nn.Parameter(torch.tensor(3.0).log())
        own = torch.eye(num_classes).repeat_interleave(self.per_class, 1)
        self.register_buffer("own", own, persistent=False)  # (C, C m), 1: prototype of the class
        self.last = nn.Parameter(1.5 * own - 0.5)  # W: 1 to the own class, -1/2 to others

    def patches(self, images):
        """images -> patches e (B, N, D), and those after an early block, the fourth of twelve."""
        blocks, prefix = self.backbone.blocks, self.backbone.prefix
        learns = self.tune != "none" and self.stage == 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            tokens = self.backbone.embed(images)
            for l, block in enumerate(blocks):
                tokens = block(tokens)
                if l == len(blocks) // 4:
                    shallow = tokens[:, prefix:].detach()
            return self.backbone.norm(tokens[:, prefix:]), shallow

    def unit_vectors(self):
        """p / |p| of all prototypes, (P, d)."""
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
        return self.of_class(similarity, labels)

    def of_class(self, x, labels):
        """x (B, n, C m) -> what belongs to the label of each image, (B, m, n)."""
        by_class = x.unflatten(2, (self.num_classes, self.per_class))
        images = torch.arange(len(labels), device=labels.device)
        return by_class[images, :, labels].transpose(1, 2)

    def owned(self, labels):
        """labels (B) -> (B, P): is a prototype one of the label's?"""
        return self.own[labels].bool()

    def class_weights(self):
        """W (C, C m), from scores to logits; fixed in stage 1."""
        return self.last if self.stage == 2 else self.last.detach()

    def read(self, cosines, labels=None):
        """cosines (B, N, P) -> Output with the maps of the labels' prototypes (None: predictions').

        The mean of concept_logits is what those prototypes add to the logits. The rest comes from
        the prototypes of other classes. features are the prototypes; there are no groupings.
        """
        W = self.class_weights()
        with torch.autocast(cosines.device.type, enabled=False):  # in bf16 classes would tie
            similarity = self.similarity(cosines)
            scores = self.scores(similarity)
            logits = scores @ W.T
            if labels is None:
                labels = logits.argmax(1)
            maps = self.maps(similarity, labels)
        background = torch.zeros_like(maps[:, :1])
        maps = torch.cat([maps, background], dim=1).unflatten(2, self.grid)
        own_scores = self.of_class(scores[:, None], labels)  # (B, m, 1)
        own_weights = self.of_class(W.expand(len(labels), -1, -1), labels)  # (B, m, C)
        concept_logits = self.per_class * (own_scores * own_weights)
        features = self.vectors.expand(len(labels), -1, -1)
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
        if self.stage == 2:
            to_others = self.last * (1 - self.own)
            losses["last_layer"] = 1e-4 * to_others.abs().sum()
        else:
            with torch.autocast(z.device.type, enabled=False):
                losses |= self.prototype_losses(z, shallow, cosines, labels)
        return losses, logits

    def prototype_losses(self, z, shallow, cosines, labels):
        """What stage 1 adds to the cross entropy."""
        own = self.owned(labels)
        distance = self.distance(cosines)
        return {
            "cluster": 0.2 * cluster(distance, own),
            "separation": 0.08 * separation(distance, own),
        }

    def distance(self, cosines):
        """|z - p|^2 of z and p on the unit sphere."""
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
    """ProtoPNet, in the three stages of its section 2.2. Stage 2 here is its third.

        1. A, s and the prototypes learn: cross entropy + 0.2 Clst + 0.08 Sep, with the squared
           distance |z - p|^2 = 2 - 2 cos(z, p) of unit vectors.
        Then every prototype is projected onto the nearest patch of its class's training images.
        2. W learns: cross entropy + 1e-4 times the L1 norm of its weights to other classes. A and s
           learn on. A prototype stays the patch e_p of an image: p = A e_p.

    The paper's z is sigmoid(A2 relu(A1 e)), its similarity log((d2 + 1) / (d2 + 1e-4)) of the
    squared distance d2. There W alone learns in stage 2; here that would leave a quarter of what
    projection costs (docs/results.md). Its program goes through the three stages every ten epochs;
    we do so once.
    """

    rates = dict(lr=1e-3, lr_prototypes=3e-3)

    def __init__(self, backbone, num_classes, tune="none"):
        super().__init__(backbone, num_classes, tune)
        self.register_buffer("sources", torch.zeros(len(self.vectors), backbone.width))  # e_p

    def first_stage(self, epochs):
        """Length of stage 1. Stage 2 has five epochs, or half of a run of fewer than ten."""
        return epochs - min(5, epochs // 2)

    def set_epoch(self, epoch, epochs):
        self.stage = 1 if epoch < self.first_stage(epochs) else 2

    def unit_vectors(self):
        if self.stage == 2:
            return F.normalize(self.add_on(self.sources), dim=1)
        return super().unit_vectors()

    @torch.no_grad()
    def after_epoch(self, epoch, epochs, dataset):
        if epoch + 1 == self.first_stage(epochs):
            self.project(dataset)
        if epoch + 1 >= self.first_stage(epochs):
            self.vectors.copy_(self.add_on(self.sources))  # a loaded model reads vectors

    def project(self, dataset):
        """Makes e_p the patch nearest to a prototype in its class's images: one can look at it.

        dataset: the training images in the test view. A prototype of no class, or of one without
        images, has e_p = 0.
        """
        self.eval()
        device = self.vectors.device
        best = torch.full((len(self.vectors),), -math.inf, device=device)  # cosine of e_p so far
        self.sources.zero_()
        for images, labels, *_ in DataLoader(dataset, 16):
            e, _ = self.patches(images.to(device))
            _, cosines = self.compare(e)
            own = self.owned(labels.to(device))[:, None]  # (B, 1, P)
            cosines = cosines.masked_fill(~own, -math.inf)
            highest, index = cosines.flatten(0, 1).max(0)  # (P), over the patches of the batch
            candidates = e.flatten(0, 1)[index]  # (P, D)
            closer = highest > best
            best[closer] = highest[closer]
            self.sources[closer] = candidates[closer]


# ---------------------------------------------------------------- TesNet
# bases (C, m, d): the m unit vectors of a class, B_c (m, d), span the subspace of the class.

def orthonormality(bases):
    """Sum over classes of the absolute entries of B_c B_c^T - I, as in TesNet's program."""
    gram = bases @ bases.transpose(1, 2)  # (C, m, m)
    identity = torch.eye(gram.shape[1], device=gram.device)
    return (gram - identity).abs().sum()


def subspace_separation(bases):
    """Minus the sum over pairs of classes of |B_c^T B_c - B_k^T B_k|_F / sqrt(2).

    |X - Y|_F^2 = tr XX + tr YY - 2 tr XY, and tr(B_c^T B_c B_k^T B_k) = |B_c B_k^T|_F^2. So no
    pair needs a d x d matrix.
    """
    C, m, _ = bases.shape
    rows = bases.flatten(0, 1)
    products = (rows @ rows.T).view(C, m, C, m)  # entries of all B_c B_k^T
    traces = products.square().sum((1, 3))  # (C, C)
    c, k = torch.triu_indices(C, C, 1, device=bases.device)  # the pairs
    squares = traces[c, c] + traces[k, k] - 2 * traces[c, k]
    return -(squares / 2).clamp_min(1e-10).sqrt().sum()


class TesNet(ProtoPNet):
    """TesNet: a class is a subspace, its prototypes are drawn towards an orthonormal basis of it.

        Stage 1: cross entropy + 0.2 Clst + 0.08 Sep, both with the distance -cos(z, p)
                 + 1e-4 orthonormality + 1e-7 subspace separation
        Projection and stage 2 are ProtoPNet's.

    The paper's score is <z, p> with p of unit length; ours is s <z, p> / |z|. Its program also sets
    |p| = 1 after every step. Our bases start orthonormal, those of its program at random positive
    numbers.
    """

    rates = dict(lr=1e-3, lr_prototypes=1e-2)

    def __init__(self, backbone, num_classes, tune="none"):
        super().__init__(backbone, num_classes, tune)
        for basis in self.vectors.data.split(self.per_class):
            nn.init.orthogonal_(basis)

    def distance(self, cosines):
        return -cosines

    def prototype_losses(self, z, shallow, cosines, labels):
        losses = super().prototype_losses(z, shallow, cosines, labels)
        bases = self.unit_vectors().unflatten(0, (self.num_classes, self.per_class))
        losses["orthonormality"] = 1e-4 * orthonormality(bases)
        losses["subspaces"] = 1e-7 * subspace_separation(bases)
        return losses


# ---------------------------------------------------------------- Huang et al.

def alignment(z, shallow, peaks):
    """Shallow-deep feature alignment of z (B, N, d) with an early block (B, N, D); peaks (B, m).

    At a prototype's peak, its best patch, the cosines with all patches should be those of the
    early block. The loss is the mean of max(|difference| - 0.1, 0).
    """
    difference = peak_cosines(z, peaks) - peak_cosines(shallow, peaks)
    return F.relu(difference.abs() - 0.1).mean()


def peak_cosines(e, peaks):
    """Cosines of the patches at the peaks (B, m) with all patches e (B, N, D): (B, m, N)."""
    e = F.normalize(to_float32(e), dim=2)
    images = torch.arange(len(e), device=e.device)[:, None]  # (B, 1)
    at_peaks = e[images, peaks]  # (B, m, D)
    return at_peaks @ e.transpose(1, 2)


class Huang(ClassPrototypes):
    """Huang et al.: TesNet without subspace separation, projection and stage 2.

        Score aggregation: W_cj = m softmax_j(w_c) to the own class, 0 to others; w is learnt.
        Loss: cross entropy + 0.2 Clst + 0.08 Sep, both with the distance -cos(z, p)
              + 1e-4 orthonormality + 0.3 shallow-deep feature alignment

    The paper aligns the last features of a backbone that is trained; ours is frozen, so z is
    aligned. Its program aligns from the sixth epoch, ours from the first. Its score is <z, p>, as
    TesNet's. Our bases start random, as in ProtoPNet.
    """

    rates = dict(lr=1e-6, lr_prototypes=1e-2)  # lr is that of w, as in its program

    def __init__(self, backbone, num_classes, tune="none"):
        super().__init__(backbone, num_classes, tune)
        self.last = nn.Parameter(torch.zeros(num_classes, self.per_class))  # w

    def class_weights(self):
        weights = self.per_class * self.last.softmax(1)  # (C, m)
        return self.own * weights.flatten()

    def distance(self, cosines):
        return -cosines

    def prototype_losses(self, z, shallow, cosines, labels):
        losses = super().prototype_losses(z, shallow, cosines, labels)
        bases = self.unit_vectors().unflatten(0, (self.num_classes, self.per_class))
        losses["orthonormality"] = 1e-4 * orthonormality(bases)
        peaks = self.maps(cosines, labels).argmax(2)  # (B, m)
        losses["alignment"] = 0.3 * alignment(z, shallow, peaks)
        return losses


# ---------------------------------------------------------------- ProtoPool

class ProtoPool(ProtoPNet):
    """ProtoPool: all classes share a pool of prototypes; each class has m slots to fill from it.

        q = Gumbel-softmax over the pool of (sharpness * a slot's logits), temperature 1/2
        g_p = max over patches of similarity_p - mean over patches        (focal similarity)
        score of a slot = sum over the pool of q_p g_p
        W starts at 1 to the slot's class, 0 to others
        1. A quarter of the epochs. A, s, the prototypes and the slots learn:
           cross entropy + 0.2 Clst + 0.08 Sep
           + mean over all slots i of the sum of cos(q_i, q_j) over the other slots j of its class
           A class owns the m prototypes of which its slots take most. The sharpness grows to 1000
           as the root of the epoch.
        Then every prototype that a class owns is projected, as in ProtoPNet.
        2. q is one-hot, the rest as in ProtoPNet.

    The maps are a slot's similarities less their mean over the patches.

    The program mixes distances by q, we mix similarities. The program takes the cosines of slots
    from their logits; the paper and we take them from q. The program adds mixup, and gives slots
    the rate of p; ours is 0.3 of that.
    """

    rates = dict(lr=2e-2, lr_prototypes=1e-2)
    pool = 202  # as on CUB

    def __init__(self, backbone, num_classes, tune="none"):
        super().__init__(backbone, num_classes, tune)
        P = len(self.vectors)
        self.slots = nn.Parameter(0.02 * torch.randn(num_classes, self.per_class, P))
        self.last = nn.Parameter(self.own.clone())  # W
        self.sharpness = 1000.0

    def first_stage(self, epochs):
        return max(1, epochs // 4)

    def set_epoch(self, epoch, epochs):
        super().set_epoch(epoch, epochs)
        self.sharpness = 1000 * ((epoch + 1) / self.first_stage(epochs)) ** 0.5  # for stage 1

    def assignment(self):
        """q (C, m, P): what a slot takes from the pool. Soft and random only while it learns."""
        if self.training and self.stage == 1:
            return F.gumbel_softmax(self.sharpness * self.slots, tau=0.5, dim=2)
        return F.one_hot(self.slots.argmax(2), len(self.vectors)).float()

    def compare(self, e):
        self.q = self.assignment()  # one draw a forward; all that follows reads it
        return super().compare(e)

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
        return (own * shares).bool()[labels]  # fewer than m where slots take the same

    def prototype_losses(self, z, shallow, cosines, labels):
        losses = super().prototype_losses(z, shallow, cosines, labels)
        q = F.normalize(self.q, dim=2)
        cosines_of_slots = q @ q.transpose(1, 2)  # (C, m, m)
        losses["slots"] = cosines_of_slots.sum(2).mean() - 1  # less a slot's cosine with itself
        return losses

    def parameter_groups(self, args):
        slots = dict(params=[self.slots], lr=0.3 * args.lr_prototypes)
        return [*super().parameter_groups(args), slots]
