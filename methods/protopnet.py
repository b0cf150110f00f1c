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

from model import Method, Output, to_float32

PER_CLASS = 10  # m
WIDTH = 128     # d; programs on CUB: 64 (TesNet, Huang), 256 (ProtoPool)


# ---------------------------------------------------------------- what all four share

def product(x, y):
    """x @ y in fp32, also under autocast: bf16 would make classes tie."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ y


def compare(z, p):
    """Cosines (B, N, P) of z (B, N, d) and prototypes p (P, d)."""
    z = F.normalize(to_float32(z), dim=2)
    return product(z, F.normalize(p, dim=1).T)


def of_class(x, labels):
    """x (B, n, C m) -> what belongs to the label of each image, (B, m, n)."""
    by_class = x.unflatten(2, (-1, PER_CLASS))  # (B, n, C, m)
    images = torch.arange(len(labels), device=labels.device)
    return by_class[images, :, labels].transpose(1, 2)


def cluster(distance, own):
    """Clst: the smallest distance from a patch to an own prototype, mean over the images.

    distance (B, N, P): from every patch to every prototype.
    own (B, P): whether a prototype is one of the image's class.
    """
    nearest = distance.amin(1)  # (B, P), over the patches
    return nearest.masked_fill(~own, math.inf).amin(1).mean()


def separation(distance, own):
    """Sep: minus the smallest distance from a patch to a prototype that is not own, mean."""
    nearest = distance.amin(1)
    return -nearest.masked_fill(own, math.inf).amin(1).mean()


class ClassPrototypes(Method):
    """An image is of the class whose prototypes its patches resemble.

        z = A e of a patch e, A affine        similarity_j = s cos(z, p_j), with a learnt s
        score_j = max over patches of similarity_j        logits = W score

    The maps are similarities to the prototypes of the image's own class, not shares. Concept j
    differs from class to class. The background map is 0: it wins where all others are negative.

    All four methods differ from their papers. Those train a CNN as well; our ViT is frozen. Their
    add-on layers end in a sigmoid, which leaves all z in one corner of the space. ProtoPNet and
    ProtoPool take the logarithm of a distance. Neither trains well on frozen patches: one linear
    layer, the cosine and a scale do. In the papers Clst weighs 0.8; 0.2 classifies better here.
    """

    class_specific = True
    accepts = ("lr_prototypes",)

    def __init__(self, backbone, num_classes, num_prototypes):
        super().__init__(backbone)
        self.prototypes = (PER_CLASS + 1,)  # number of maps, with the background
        self.add_on = nn.Linear(backbone.width, WIDTH)  # A
        self.vectors = nn.Parameter(torch.randn(num_prototypes, WIDTH))  # p, of any length
        self.log_scale = nn.Parameter(torch.tensor(3.0).log())
        own = torch.eye(num_classes).repeat_interleave(PER_CLASS, 1)
        self.register_buffer("own", own, persistent=False)  # (C, C m), 1: prototype of the class
        self.last = nn.Parameter(1.5 * own - 0.5)  # W: 1 to the own class, -1/2 to others

    def classify(self, cosines, W, labels):
        """cosines (B, N, C m), W (C, C m) -> Output with the maps of the labels' prototypes.

        Without labels they are those of the predicted classes.
        """
        similarity = self.log_scale.exp() * cosines  # s cos(z, p_j)
        scores = similarity.amax(1)  # max over patches, (B, C m)
        logits = product(scores, W.T)
        if labels is None:
            labels = logits.argmax(1)
        maps = of_class(similarity, labels)
        return self.output(logits, scores, W, maps, labels)

    def output(self, logits, scores, W, maps, labels):
        """maps (B, m, N) of the labels' prototypes; the rest as in classify -> Output.

        The mean of concept_logits is what these prototypes add to the logits. The rest comes from
        those of other classes. features are all prototypes (B, P, d); there are no groups.
        """
        B = len(labels)
        background = torch.zeros_like(maps[:, :1])
        maps = torch.cat([maps, background], dim=1).unflatten(2, self.grid)
        own_scores = of_class(scores[:, None], labels)  # (B, m, 1)
        own_weights = of_class(W.expand(B, -1, -1), labels)  # (B, m, C)
        concept_logits = PER_CLASS * (own_scores * own_weights)
        features = self.vectors.expand(B, -1, -1)
        return Output(logits, concept_logits, [maps], [], [], features)

    def parameter_groups(self, args):
        trained = [*self.add_on.parameters(), self.vectors, self.log_scale]
        return [
            dict(params=[self.last], lr=args.lr),
            dict(params=trained, lr=args.lr_prototypes)]


# ---------------------------------------------------------------- ProtoPNet

class ProtoPNet(ClassPrototypes):
    """ProtoPNet, in the three stages of its section 2.2: 1, the projection, and our stage 2.

        similarity_j = s cos(A e, p_j)        logits = W max over patches of similarity
        1. A, s and the prototypes are trained, W is fixed at 1 to the own class and -1/2 to others:
           cross entropy + 0.2 Clst + 0.08 Sep, with |z - p|^2 = 2 - 2 cos(z, p) of unit vectors.
        Then every prototype is projected onto the nearest patch of its class's training images.
        2. In the last five epochs, or half of a run below ten, W, A and s are trained: cross
           entropy + 1e-4 sum |W to other classes|. A prototype stays on its patch e_p: p = A e_p.

    The paper's z is sigmoid(A2 relu(A1 e)), its similarity log((d2 + 1) / (d2 + 1e-4)) of the
    squared distance d2. In its stage 2 only W is trained; here that would not make up for what
    projection costs. Its program goes through the three stages every ten epochs; we do so once.
    """

    rates = dict(lr=1e-3, lr_prototypes=3e-3)
    has_stages = True

    def __init__(self, backbone, num_classes, num_prototypes=None):
        P = num_prototypes or num_classes * PER_CLASS
        super().__init__(backbone, num_classes, P)
        self.register_buffer("sources", torch.zeros(P, backbone.width))  # e_p
        self.stage = 1

    def forward(self, images, labels=None):
        return self.classify(self.cosines(images), self.class_weights(), labels)

    def cosines(self, images):
        """cos(z, p) of all patches and prototypes, (B, N, P)."""
        e, = self.backbone.last_patches(images, 1)  # (B, N, D)
        z = self.add_on(e)
        if self.stage == 1:
            return compare(z, self.vectors)
        with torch.autocast(z.device.type, enabled=False):
            return compare(z, self.add_on(self.sources))  # p = A e_p

    def class_weights(self):
        """W (C, C m), from scores to logits; fixed in stage 1."""
        return self.last.detach() if self.stage == 1 else self.last

    def losses(self, images, labels, theta):
        cosines = self.cosines(images)
        logits = self.classify(cosines, self.class_weights(), labels).logits
        losses = dict(classification=F.cross_entropy(logits, labels))
        if self.stage == 1:
            own = self.own[labels].bool()
            distance = 2 - 2 * cosines  # |z - p|^2
            losses["cluster"] = 0.2 * cluster(distance, own)
            losses["separation"] = 0.08 * separation(distance, own)
        else:
            to_others = self.last * (1 - self.own)
            losses["last_layer"] = 1e-4 * to_others.abs().sum()
        losses["loss"] = sum(losses.values())
        return losses, logits

    def first_stage(self, epochs):  # its length
        return epochs - min(5, epochs // 2)

    def before_epoch(self, epoch, epochs):
        self.stage = 1 if epoch < self.first_stage(epochs) else 2

    @torch.no_grad()
    def after_epoch(self, epoch, epochs, dataset):
        if epoch + 1 == self.first_stage(epochs):
            self.project(dataset, self.own.bool())
        if epoch + 1 >= self.first_stage(epochs):
            self.vectors.copy_(self.add_on(self.sources))  # a loaded model reads these: stage 1

    def project(self, dataset, own):
        """Makes e_p the patch nearest to a prototype in the images of the classes that own it.

        own (C, P): which prototypes a class owns. One that is nobody's, or whose class has no
        images, has e_p = 0.
        """
        best = torch.full_like(self.vectors[:, 0], -math.inf)  # (P), cosine of e_p so far
        self.sources.zero_()
        for images, labels, *_ in DataLoader(dataset, 16):
            e, = self.backbone.last_patches(images.to(best.device), 1)
            cosines = compare(self.add_on(e), self.vectors)
            allowed = own[labels.to(best.device)][:, None]  # (B, 1, P)
            cosines = cosines.masked_fill(~allowed, -math.inf)
            highest, index = cosines.flatten(0, 1).max(0)  # (P), over the patches of the batch
            candidates = e.flatten(0, 1)[index]  # (P, D)
            closer = highest > best
            best[closer] = highest[closer]
            self.sources[closer] = candidates[closer]


# ---------------------------------------------------------------- TesNet
# bases (C, m, d): the m unit vectors of a class, B_c (m, d), span the subspace of the class.

def orthonormality(bases):
    """Sum over classes of the absolute entries of B_c B_c^T - I, as in TesNet's program."""
    gram = product(bases, bases.transpose(1, 2))  # (C, m, m)
    identity = torch.eye(gram.shape[1], device=gram.device)
    return (gram - identity).abs().sum()


def subspace_separation(bases):
    """Minus the sum over pairs of classes of |B_c^T B_c - B_k^T B_k|_F / sqrt(2).

    |X - Y|_F^2 = tr XX + tr YY - 2 tr XY, and tr(B_c^T B_c B_k^T B_k) = |B_c B_k^T|_F^2. So no
    pair needs a d x d matrix.
    """
    C, m, _ = bases.shape
    rows = bases.flatten(0, 1)
    products = product(rows, rows.T).view(C, m, C, m)  # entries of all B_c B_k^T
    traces = products.square().sum((1, 3))  # (C, C)
    c, k = torch.triu_indices(C, C, 1, device=bases.device)  # the pairs
    squares = traces[c, c] + traces[k, k] - 2 * traces[c, k]
    return -(squares / 2).clamp_min(1e-10).sqrt().sum()


class TesNet(ProtoPNet):
    """TesNet: a class is a subspace, its prototypes are drawn towards an orthonormal basis of it.

        Stage 1: cross entropy + 0.2 Clst + 0.08 Sep, both with the distance -cos(z, p)
                 + 1e-4 orthonormality + 1e-7 subspace separation
        Forward, projection and stage 2 are ProtoPNet's.

    The paper's score is <z, p> with p of unit length; ours is s <z, p> / |z|. Its program also sets
    |p| = 1 after every step. Our bases start orthonormal, those of its program at random positive
    numbers.
    """

    rates = dict(lr=1e-3, lr_prototypes=1e-2)

    def __init__(self, backbone, num_classes):
        super().__init__(backbone, num_classes)
        for basis in self.vectors.data.split(PER_CLASS):
            nn.init.orthogonal_(basis)

    def losses(self, images, labels, theta):
        if self.stage == 2:
            return super().losses(images, labels, theta)
        cosines = self.cosines(images)
        logits = self.classify(cosines, self.class_weights(), labels).logits
        own = self.own[labels].bool()
        bases = F.normalize(self.vectors, dim=1).unflatten(0, (-1, PER_CLASS))
        losses = dict(
            classification=F.cross_entropy(logits, labels),
            cluster=0.2 * cluster(-cosines, own),
            separation=0.08 * separation(-cosines, own),
            orthonormality=1e-4 * orthonormality(bases),
            subspaces=1e-7 * subspace_separation(bases))
        losses["loss"] = sum(losses.values())
        return losses, logits


# ---------------------------------------------------------------- Huang et al.

def shallow_and_deep(images, backbone):
    """images -> patches (B, N, D) after the fourth of twelve blocks, and normed ones at the end."""
    tokens = backbone.embed(images)
    for l, block in enumerate(backbone.blocks):
        tokens = block(tokens)
        if l == len(backbone.blocks) // 4:
            shallow = tokens[:, backbone.prefix:]
    return shallow, backbone.normed_patches(tokens)


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
    return product(at_peaks, e.transpose(1, 2))


class Huang(ClassPrototypes):
    """Huang et al. (Evaluation and Improvement of Interpretability, ICCV 2023): one stage.

        similarity_j = s cos(A e, p_j)        logits = W max over patches of similarity
        Score aggregation: W_cj = m softmax_j(w_c) to the own class, 0 to others. At its program's
        rate of 1e-6 w stays near 0, and W near 1.
        Loss: cross entropy + 0.2 Clst + 0.08 Sep, both with the distance -cos(z, p)
              + 1e-4 orthonormality + 0.3 shallow-deep feature alignment

    The paper aligns the last features of a backbone that is trained; ours is frozen, so z is
    aligned. Its program aligns from the sixth epoch, ours from the first. Its score is <z, p>, as
    TesNet's. Our bases start random, as in ProtoPNet.
    """

    rates = dict(lr=1e-6, lr_prototypes=1e-2)  # lr is that of w, as in its program

    def __init__(self, backbone, num_classes):
        super().__init__(backbone, num_classes, num_classes * PER_CLASS)
        self.last = nn.Parameter(torch.zeros(num_classes, PER_CLASS))  # w

    def forward(self, images, labels=None):
        e, = self.backbone.last_patches(images, 1)  # (B, N, D)
        cosines = compare(self.add_on(e), self.vectors)
        return self.classify(cosines, self.class_weights(), labels)

    def class_weights(self):
        """W (C, C m), from scores to logits."""
        weights = PER_CLASS * self.last.softmax(1)  # (C, m)
        return self.own * weights.flatten()

    def losses(self, images, labels, theta):
        shallow, e = shallow_and_deep(images, self.backbone)
        z = self.add_on(e)
        cosines = compare(z, self.vectors)
        logits = self.classify(cosines, self.class_weights(), labels).logits
        own = self.own[labels].bool()
        bases = F.normalize(self.vectors, dim=1).unflatten(0, (-1, PER_CLASS))
        peaks = of_class(cosines, labels).argmax(2)  # (B, m)
        losses = dict(
            classification=F.cross_entropy(logits, labels),
            cluster=0.2 * cluster(-cosines, own),
            separation=0.08 * separation(-cosines, own),
            orthonormality=1e-4 * orthonormality(bases),
            alignment=0.3 * alignment(z, shallow, peaks))
        losses["loss"] = sum(losses.values())
        return losses, logits


# ---------------------------------------------------------------- ProtoPool

def owned_by_slots(q):
    """q (C, m, P) -> bool (C, P): a class owns the m prototypes with the largest sum of q."""
    shares = q.detach().sum(1)  # (C, P)
    largest = shares.topk(q.shape[1], dim=1).indices
    own = torch.zeros_like(shares).scatter(1, largest, 1.0)
    return (own * shares).bool()  # fewer than m where slots chose the same one


def slot_similarity(q):
    """Mean over all slots i of the sum of cos(q_i, q_j) over the other slots j of its class."""
    q = F.normalize(q, dim=2)
    cosines = product(q, q.transpose(1, 2))  # (C, m, m)
    return cosines.sum(2).mean() - 1  # less a slot's cosine with itself


class ProtoPool(ProtoPNet):
    """ProtoPool: all classes share a pool of prototypes; each class has m slots to fill from it.

        q = Gumbel-softmax over the pool of (sharpness * a slot's logits), temperature 1/2
        g_p = max over patches of similarity_p - mean over patches        (focal similarity)
        score of a slot = sum over the pool of q_p g_p
        W starts at 1 to the slot's class, 0 to others
        1. In a quarter of the epochs A, s, the prototypes and the slots are trained: cross entropy
           + 0.2 Clst + 0.08 Sep + slot similarity. The sharpness grows to 1000 as the root of the
           epoch.
        Then every prototype that a class owns is projected, as in ProtoPNet.
        2. q is one-hot, the rest as in ProtoPNet.

    The program mixes distances by q, we mix similarities. The program takes the cosines of slots
    from their logits; the paper and we take them from q. The program adds mixup, and gives slots
    the rate of p; ours is 0.3 of that.
    """

    rates = dict(lr=2e-2, lr_prototypes=1e-2)

    def __init__(self, backbone, num_classes):
        P = 202  # as on CUB
        super().__init__(backbone, num_classes, P)
        self.slots = nn.Parameter(0.02 * torch.randn(num_classes, PER_CLASS, P))
        self.last = nn.Parameter(self.own.clone())  # W
        self.sharpness = 1000.0

    def forward(self, images, labels=None):
        return self.classify_slots(self.cosines(images), self.assignment(), labels)

    def assignment(self):
        """q (C, m, P): what a slot takes from the pool. Soft and random only in stage 1."""
        if self.training and self.stage == 1:
            return F.gumbel_softmax(self.sharpness * self.slots, tau=0.5, dim=2)
        return F.one_hot(self.slots.argmax(2), len(self.vectors)).float()

    def classify_slots(self, cosines, q, labels):
        """cosines (B, N, P), q (C, m, P) -> Output with the maps of the labels' slots: similarity
        less its mean over the patches."""
        W = self.class_weights()
        focal = cosines - cosines.mean(1, keepdim=True)
        similarity = self.log_scale.exp() * focal  # (B, N, P)
        g = similarity.amax(1)
        scores = product(g, q.flatten(0, 1).T)  # sum over the pool of q_p g_p, (B, C m)
        logits = product(scores, W.T)
        if labels is None:
            labels = logits.argmax(1)
        maps = product(q[labels], similarity.transpose(1, 2))  # (B, m, N)
        return self.output(logits, scores, W, maps, labels)

    def losses(self, images, labels, theta):
        cosines, q = self.cosines(images), self.assignment()
        logits = self.classify_slots(cosines, q, labels).logits
        losses = dict(classification=F.cross_entropy(logits, labels))
        if self.stage == 1:
            own = owned_by_slots(q)[labels]
            distance = 2 - 2 * cosines  # |z - p|^2
            losses["cluster"] = 0.2 * cluster(distance, own)
            losses["separation"] = 0.08 * separation(distance, own)
            losses["slots"] = slot_similarity(q)
        else:
            to_others = self.last * (1 - self.own)
            losses["last_layer"] = 1e-4 * to_others.abs().sum()
        losses["loss"] = sum(losses.values())
        return losses, logits

    def first_stage(self, epochs):
        return max(1, epochs // 4)

    def before_epoch(self, epoch, epochs):
        super().before_epoch(epoch, epochs)
        self.sharpness = 1000 * ((epoch + 1) / self.first_stage(epochs)) ** 0.5  # for stage 1

    @torch.no_grad()
    def after_epoch(self, epoch, epochs, dataset):
        if epoch + 1 == self.first_stage(epochs):
            self.eval()  # so that assignment() is one-hot
            self.project(dataset, owned_by_slots(self.assignment()))
        if epoch + 1 >= self.first_stage(epochs):
            self.vectors.copy_(self.add_on(self.sources))

    def parameter_groups(self, args):
        slots = dict(params=[self.slots], lr=0.3 * args.lr_prototypes)
        return [*super().parameter_groups(args), slots]
