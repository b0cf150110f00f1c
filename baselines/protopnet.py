"""Prototypical part networks on the patches of a frozen ViT; every class has prototypes of its own.

    python train.py --method protopnet    # Chen et al. 2019, arXiv 1806.10574
    python train.py --method huang        # Huang et al. 2023, arXiv 2212.05946

Letters in shapes are those of model.py; m is the number of prototypes of a class, d their width.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from model import Output, to_float32, tune_backbone


# ---------------------------------------------------------------- the losses
# d2 (B, N, C, m): squared distances of N patches to the m prototypes of each of C classes.

def cluster(d2, labels):
    """Clst: every image has a patch near a prototype of its class. Mean smallest distance."""
    own_d2 = d2[torch.arange(len(d2), device=d2.device), :, labels]  # (B, N, m)
    return own_d2.amin((1, 2)).mean()


def separation(d2, labels):
    """Sep: no patch is near a prototype of another class. Minus the mean smallest distance."""
    is_own = F.one_hot(labels, d2.shape[2]).bool()[:, :, None]  # (B, C, 1)
    others = d2.amin(1).masked_fill(is_own, math.inf)  # (B, C, m)
    return -others.amin((1, 2)).mean()


def alignment(z, shallow, d2, labels, slack=0.1):
    """Huang et al.'s shallow-deep feature alignment of z (B, N, d) with an early block (B, N, D).

    Where a prototype of the class matches best, the patch should resemble the other patches as
    much as it does in the early block: mean excess of |difference of cosines| over the slack.
    """
    peaks = d2[torch.arange(len(d2), device=d2.device), :, labels].argmin(1)  # (B, m)
    difference = peak_cosines(z, peaks) - peak_cosines(shallow, peaks)
    return F.relu(difference.abs() - slack).mean()


def peak_cosines(e, peaks):
    """Cosines of the patches e (B, N, D) with those at the peaks (B, m): (B, m, N)."""
    e = F.normalize(to_float32(e), dim=2)
    index = peaks[..., None].expand(-1, -1, e.shape[2])
    at_peaks = e.gather(1, index)  # (B, m, D)
    with torch.autocast(e.device.type, enabled=False):
        return at_peaks @ e.transpose(1, 2)


# ---------------------------------------------------------------- what both methods share

class ClassPrototypes(nn.Module):
    """An image is of a class because its patches look like that class's prototypes.

        z = sigmoid(A2 relu(A1 e)) of a patch e,   d2 = |z - p_j|^2
        score_j = max over patches of log((d2 + 1) / (d2 + 1e-4)),   logits = W score

    W is 1 to the prototype's own class and -1/2 to others.

    The maps shown are those of the image's own class, so concept j is another one in every class.
    Output.attention holds similarities, not shares; the background map is 0 and wins no patch.

    On a frozen ViT both methods are undertrained at these settings (docs/results.md): the figures
    describe a setting, not the methods.
    """

    class_specific = True

    def __init__(self, backbone, num_classes, per_class=10, width=128, tune="none"):
        super().__init__()
        tune_backbone(backbone, tune)
        self.backbone = backbone
        self.tune = tune
        self.grid = backbone.grid
        self.num_classes = num_classes
        self.per_class = per_class
        self.prototypes = (per_class + 1,)  # how many; they themselves are in vectors
        self.last_only = False
        self.add_on = nn.Sequential(
            nn.Linear(backbone.width, width), nn.ReLU(),
            nn.Linear(width, width), nn.Sigmoid())
        self.vectors = nn.Parameter(torch.rand(num_classes * per_class, width))  # p, (C m, d)
        own = torch.eye(num_classes).repeat_interleave(per_class, 1)  # (C, C m), 1: own class
        self.register_buffer("own", own, persistent=False)
        self.last = nn.Parameter(1.5 * own - 0.5)  # W

    def compare(self, images):
        """images -> z (B, N, d), the patches of an early block (B, N, D), d2 (B, N, C, m)."""
        blocks, prefix = self.backbone.blocks, self.backbone.prefix
        learns = self.tune != "none" and not self.last_only
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            tokens = self.backbone.embed(images)
            for l, block in enumerate(blocks):
                tokens = block(tokens)
                if l == len(blocks) // 4:
                    shallow = tokens[:, prefix:].detach()
            patches = self.backbone.norm(tokens[:, prefix:])
        z = to_float32(self.add_on(patches))
        with torch.autocast(z.device.type, enabled=False):
            z_norm = z.square().sum(2, keepdim=True)
            d2 = z_norm - 2 * z @ self.vectors.T + self.vectors.square().sum(1)
        d2 = d2.clamp_min(0)  # rounding can leave it below
        return z, shallow, d2.unflatten(2, (self.num_classes, self.per_class))

    def class_weights(self):
        """W (C, C m): what a prototype's score adds to a class's logit."""
        return self.last if self.last_only else self.last.detach()

    def read(self, d2, labels=None):
        """d2 (B, N, C, m) -> Output with the maps of the labels' prototypes (None: predictions').

        The mean of concept_logits is what those prototypes add to the logits. The rest comes from
        the prototypes of other classes.
        """
        similarity = ((d2 + 1) / (d2 + 1e-4)).log()
        scores = similarity.amax(1)  # (B, C, m)
        if self.last_only:
            scores = scores.detach()
        W = self.class_weights()
        with torch.autocast(d2.device.type, enabled=False):  # bf16 cannot tell the classes apart
            logits = scores.flatten(1) @ W.T
        if labels is None:
            labels = logits.argmax(1)
        each = torch.arange(len(d2), device=d2.device)
        maps = similarity[each, :, labels].transpose(1, 2)  # (B, m, N)
        background = torch.zeros_like(maps[:, :1])  # similarities are above 0: it wins no patch
        maps = torch.cat([maps, background], dim=1).unflatten(2, self.grid)
        W = W.unflatten(1, (self.num_classes, self.per_class))  # (C, C, m): to a class, of a class
        shown_weights = W[:, labels].permute(1, 2, 0)  # (B, m, C)
        shown_scores = scores[each, labels]  # (B, m)
        concept_logits = self.per_class * shown_scores[..., None] * shown_weights
        features = self.vectors.expand(len(d2), -1, -1)
        return Output(logits, concept_logits, [maps], [], [], features)

    def forward(self, images, labels=None):
        """images (B, 3, H, W), labels (B) of the prototypes to show -> Output, see read."""
        _, _, d2 = self.compare(images)
        return self.read(d2, labels)

    def losses(self, images, labels):
        z, shallow, d2 = self.compare(images)
        logits = self.read(d2, labels).logits
        losses = {"classification": F.cross_entropy(logits, labels)}
        if self.last_only:
            losses["last_layer"] = 1e-4 * (self.last * (1 - self.own)).abs().sum()
        else:
            losses |= self.map_losses(z, shallow, d2, labels)
        return losses, logits

    def map_losses(self, z, shallow, d2, labels):
        return {
            "cluster": 0.8 * cluster(d2, labels),
            "separation": 0.08 * separation(d2, labels),
        }

    def parameter_groups(self, args):
        backbone_rate = args.lr_backbone if self.tune == "all" else args.lr_prototypes
        return [
            dict(params=[self.last], lr=args.lr),
            dict(params=[*self.add_on.parameters(), self.vectors], lr=args.lr_prototypes),
            dict(params=self.backbone.parameters(), lr=backbone_rate),  # frozen unless tuned
        ]


# ---------------------------------------------------------------- ProtoPNet

class ProtoPNet(ClassPrototypes):
    """ProtoPNet, in two stages.

        1. Add-on layers and prototypes learn: cross entropy + 0.8 Clst + 0.08 Sep (section 2.2).
        Then every prototype is projected onto the nearest patch of its class's training images.
        2. W alone learns: cross entropy + 1e-4 times the L1 norm of its weights to other classes.

    Footnote: the original also trains its backbone, and starts the add-on layers otherwise.
    """

    # lr_prototypes is the authors'. lr has fallen to 3e-4 when stage 2 of 25 epochs begins; theirs
    # is 1e-4.
    rates = dict(lr=1e-2, lr_prototypes=3e-3)

    def last_stage_begins(self, epochs):
        """Five epochs before the end, or half of a short run; a single epoch has no last stage."""
        return epochs - min(5, epochs // 2)

    def set_epoch(self, epoch, epochs):
        self.last_only = epoch >= self.last_stage_begins(epochs)

    def after_epoch(self, epoch, epochs, dataset):
        if epoch + 1 == self.last_stage_begins(epochs):
            self.project(dataset)

    @torch.no_grad()
    def project(self, dataset):
        """Every prototype becomes the nearest patch of its class's images: one can look at it.

        dataset: the training images in the test view. Prototypes of a class without images stay.
        """
        C, m = self.num_classes, self.per_class
        device = self.vectors.device
        best = torch.full((C, m), math.inf, device=device)
        found = self.vectors.unflatten(0, (C, m)).clone()
        for images, labels, *_ in DataLoader(dataset, 16):
            z, _, d2 = self.compare(images.to(device))
            for patches, distances, c in zip(z, d2, labels.tolist()):
                nearest, index = distances[:, c].min(0)  # (m)
                closer = nearest < best[c]
                best[c] = torch.where(closer, nearest, best[c])
                found[c] = torch.where(closer[:, None], patches[index], found[c])
        self.vectors.copy_(found.flatten(0, 1))


# ---------------------------------------------------------------- Huang et al.

class Huang(ClassPrototypes):
    """Huang et al.: ProtoPNet's losses and more, without projection and last stage.

    Score aggregation: scores count for their own class alone. Their weights are learnt, positive
    and sum to m: W_cj = m softmax_j(w_c). Shallow-deep feature alignment has the weight 0.3.

    Footnotes: theirs aligns the last map of a backbone that is trained; ours is frozen, so z is
    aligned. Their scores are cosines with prototypes of unit length; they have an orthogonality
    loss and weight decay. Their alignment sets in after five epochs, ours at once.
    """

    rates = dict(lr=1e-6, lr_prototypes=3e-3)

    def __init__(self, backbone, num_classes, per_class=10, width=128, tune="none"):
        super().__init__(backbone, num_classes, per_class, width, tune)
        self.last = nn.Parameter(torch.zeros(num_classes, per_class))  # w

    def class_weights(self):
        return self.own * (self.per_class * self.last.softmax(1)).flatten()

    def map_losses(self, z, shallow, d2, labels):
        losses = super().map_losses(z, shallow, d2, labels)
        losses["alignment"] = 0.3 * alignment(z, shallow, d2, labels)
        return losses
