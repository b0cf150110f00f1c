"""How many prototypes your images support: the number of clusters that two halves of them agree on.

    python explore/count_prototypes.py --data FOLDER --weights FILE.pth

Takes train.py's options and prints one line for it, such as: --prototypes 10 8 8 12 12
The numbers include the background. Clusters are those of --start clusters: of foreground patches
of the unprompted ViT, or with --method parts of the patches as its prototypes meet them.
"""
import sys
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model as ivpt
import train

MOST = 16  # clusters of a layer


def count_clusters(e, seed):
    """Foreground patches e (n, D), image by image -> the largest K on which the halves agree."""
    counts = [K for K in range(2, MOST + 1) if halves_agree(e, K, seed)]
    return max(counts, default=1)


def halves_agree(e, K, seed):
    """Whether each of K clusters of the first half of e (n, D) matches one of the second half.

    All patches are assigned to both clusterings. Two clusters match if more than half of the
    patches in either are in both. Hennig (2007) calls a cluster with a lower Jaccard index
    dissolved.
    """
    half = len(e) // 2
    members = []  # of the clusters of each half, (n, K)
    for patches in (e[:half], e[half:]):
        centres = ivpt.kmeans(patches, K, seed, starts=5)
        owner = ivpt.squared_distances(e, centres).argmin(1)
        members.append(F.one_hot(owner, K).float())
    first, second = members
    shared = first.T @ second  # (K, K), numbers of patches
    either = first.sum(0)[:, None] + second.sum(0) - shared
    return bool(((shared / either).amax(1) > 0.5).all())


def main(argv=None):
    args = train.parse(argv)
    train.check_model(args)
    train.use_cores(args)
    folder = data.find(args.data, args.data_root)
    split = "fit" if args.validate else "train"
    augmented = data.Images(folder, split, "train", args.image_size, args.seed)
    unaugmented = data.Images(folder, split, "test", args.image_size)
    model = train.new_model(args, augmented, data.local_device(args.device))
    counts = []
    for e, foreground, _ in model.sample_regions(unaugmented, args.seed):
        counts.append(count_clusters(e[foreground], args.seed) + 1)  # and the background
    print("--prototypes", *counts)


if __name__ == "__main__":
    data.run_script(main)
