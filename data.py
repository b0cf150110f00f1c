"""The images of IVPT (ICLR 2026, arXiv 2503.06084): CUB-200-2011, drawn birds, or your own.

    python data.py --data cub --data-root DIR   # find CUB in DIR, or download it there (1.1 GB)
    python data.py --data FOLDER                # open every image; print what is skipped or damaged

Your folder holds a folder for each class: train/CLASS/IMAGE and test/CLASS/IMAGE (or val/). With
boxes or parts it has CUB's layout, which read_cub describes. The scripts in prepare/ convert other
data sets to it.
"""
import argparse
import functools
import math
import os
import re
import shutil
import sys
import unicodedata
from collections import Counter
from pathlib import Path

if sys.version_info < (3, 11):
    print("error: IVPT needs Python 3.11 or newer, found", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T
from tqdm import tqdm

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
CUB_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
WHOLE_IMAGE = (0, 0, np.inf, np.inf)  # the box of an image that has none: x, y, width, height
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # quota and period, in microseconds
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items()
            if Image.MIME.get(kind, "").startswith("image/")}  # that this Pillow can read


# ---- 1. Where the data is ------------------------------------------------------------------------
def find(data, data_root=None):
    """The folder of a data set. "toy" is drawn and "cub" is downloaded at first use.

    data: "toy", "cub" or a folder. data_root: where data sets are, by default ~/.cache/ivpt; a
    folder's default is the working directory. Raises OSError where there is no such data.
    """
    root = Path(data_root or "~/.cache/ivpt").expanduser()
    if data == "toy":
        try:
            from prepare import toy_birds
        except ImportError as error:
            raise FileNotFoundError(f"--data toy: {error}; it needs the folder prepare/") from None
        folder = root / toy_birds.FOLDER
    elif data == "cub" and not missing_lists(root):
        folder = root
    elif data == "cub":
        folder = root / "CUB_200_2011"
    else:
        folder = Path(data_root or "", data).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"--data {data}: no such folder; expected toy, cub or a folder")
    if folder.is_dir():
        if data == "cub" and missing_lists(folder):
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing_lists(folder))}; remove "
                                    "it, and it is fetched and unpacked again")
        return folder
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        command = f"python data.py --data {data} --data-root {root}"
        raise FileNotFoundError(f"{folder} is missing; before torchrun, run {command}")
    if data == "toy":
        toy_birds.draw(folder)
        return folder
    unpacking = root / "CUB_unpacking"
    try:
        download_and_extract_archive(CUB_URL, root, unpacking, md5=CUB_MD5)
        (unpacking / folder.name).rename(folder)  # so what is there is whole
    except (OSError, RuntimeError) as error:
        raise OSError(f"{CUB_URL}: {error}; fetch it yourself and put it into {root}") from None
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)
    return folder


# ---- 2. The two layouts --------------------------------------------------------------------------
def missing_lists(folder):
    """What CUB's layout needs and the folder lacks."""
    return [name for name in CUB_LISTS if not (folder / name).is_file()]


def read_folder(folder):
    """What a folder holds, without opening an image.

    Returns the names of the classes and of the M parts; then, for all n images: files, labels,
    whether they are for training, boxes (n, 4) of x, y, width, height, and key points (n, M, 3) of
    x, y, visible. Boxes and key points are in pixels of the file.
    """
    missing = missing_lists(folder)
    if not missing:
        return read_cub(folder)
    if (folder / "train").is_dir():
        return read_class_folders(folder)
    raise FileNotFoundError(f"{folder} has neither {', '.join(missing)} nor train/CLASS/IMAGE")


def read_cub(folder):
    """CUB-200-2011 (Wah et al. 2011), a subset of it, or other data in its layout.

    images.txt              ID FILE, below images/     classes.txt          CLASS NAME
    image_class_labels.txt  ID CLASS                   bounding_boxes.txt   ID X Y WIDTH HEIGHT
    train_test_split.txt    ID 1, or 0 for testing     parts/parts.txt      PART NAME
                                                       parts/part_locs.txt  ID PART X Y VISIBLE
    The lists on the right are optional. ID, CLASS and PART are any words. Without classes.txt,
    classes are called like the folders of their images.
    """
    file_of = dict(read_list(folder / "images.txt", 2))
    class_of = dict(read_list(folder / "image_class_labels.txt", 2))
    split_of = dict(read_list(folder / "train_test_split.txt", 2))
    class_names = dict(read_list(folder / "classes.txt", 2))
    part_names = dict(read_list(folder / "parts/parts.txt", 2))
    box_of = {key: box for key, *box in read_list(folder / "bounding_boxes.txt", 5, numbers=4)}
    points = read_list(folder / "parts/part_locs.txt", 5, numbers=3)
    row_of = {key: row for row, key in enumerate(file_of)}
    part_of = {key: part for part, key in enumerate(part_names)}
    keypoints = np.zeros((len(file_of), len(part_names), 3))
    try:
        if not class_names:
            class_names = {class_of[key]: Path(file).parent.name for key, file in file_of.items()}
        label_of = {key: label for label, key in enumerate(class_names)}
        labels = [label_of[class_of[key]] for key in file_of]
        for_training = [{"1": True, "0": False}[split_of[key]] for key in file_of]
        boxes = np.array([box_of.get(key, WHOLE_IMAGE) for key in file_of], float)
        for key, part, *point in points:
            if key in row_of:  # a subset may come with the list of all images
                keypoints[row_of[key], part_of[part]] = point
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder}: its lists do not fit together at {error}") from None
    files = [folder / "images" / file for file in file_of.values()]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, though images.txt names it; if an archive "
                                    f"was unpacked in half, remove {folder}")
    classes = list(class_names.values())
    return classes, list(part_names.values()), files, labels, for_training, boxes, keypoints


def read_list(path, columns, numbers=0):
    """The rows of a list, split into fields; the last may contain spaces. No file, no rows.
    numbers: how many of the last fields must be finite numbers."""
    if not path.is_file():
        return []
    # Windows may put a mark in front (-sig). A file's name may be in any encoding.
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    rows = [line.strip().split(maxsplit=columns - 1) for line in lines if line.strip()]
    for row in rows:
        if len(row) != columns:
            raise ValueError(f"{path}: expected {columns} fields, found {' '.join(row)}")
        try:
            finite = all(math.isfinite(float(field)) for field in row[columns - numbers:])
        except ValueError:
            finite = False
        if not finite:
            raise ValueError(f"{path}: expected {numbers} finite numbers in {' '.join(row)}; "
                             "mend the line, or take it out")
    return rows


def read_class_folders(folder):
    """train/CLASS/IMAGE and test/CLASS/IMAGE, or val/ where test/ has no class of train/."""
    train_files, train_names = class_images(folder / "train")
    classes = sorted(set(train_names))
    label_of = {name: label for label, name in enumerate(classes)}
    for test in (folder / "test", folder / "val"):
        test_files, test_names = class_images(test)
        if label_of.keys() & test_names:
            break
    else:  # neither
        raise FileNotFoundError(f"{folder}: no class has images in train/ and in test/ or val/")
    for name in sorted(set(test_names) - label_of.keys()):
        alike = [other for other in classes if other.casefold() == name.casefold()]
        but = f", but there is {alike[0]}" if alike else ""
        raise ValueError(f"{test / name}: there is no such class in train/{but}")
    files = train_files + test_files
    labels = [label_of[name] for name in train_names + test_names]
    for_training = [True] * len(train_files) + [False] * len(test_files)
    boxes = np.tile(WHOLE_IMAGE, (len(files), 1))
    keypoints = np.zeros((len(files), 0, 3))
    return classes, [], files, labels, for_training, boxes, keypoints


def class_images(folder):
    """All images below folder/CLASS/ and the class of each. Links that would count an image of
    this folder again are skipped, as is what is no image, and this is printed.
    Names are in Unicode's composed form (NFC): a disk of macOS may hold the other one."""
    files, class_names, skipped = [], [], Counter()
    root, walked = folder.resolve(), set()
    for place, subfolders, names in os.walk(folder, followlinks=True):
        subfolders.sort()
        real = Path(place).resolve()
        is_link = real != root / Path(place).relative_to(folder)
        if is_link and (real in walked or real.is_relative_to(root) or root.is_relative_to(real)):
            skipped["link to a folder that is counted anyway"] += 1
            subfolders.clear()
            continue
        walked.add(real)
        for name in sorted(names):
            file = Path(place, name)
            below = file.relative_to(folder).parts  # CLASS, perhaps more folders, the file's name
            if any(word[0] in ".@" for word in below):  # such as .DS_Store, @eaDir
                skipped["hidden"] += 1
            elif not file.is_file():
                skipped["broken link"] += 1
            elif file.suffix.lower() not in SUFFIXES:
                skipped[f"with suffix {file.suffix!r}"] += 1
            elif file.is_symlink() and file.resolve().is_relative_to(root):
                skipped["link to an image of this folder"] += 1
            elif len(below) == 1:
                skipped["in no class folder"] += 1
            else:
                files.append(file)
                class_names.append(unicodedata.normalize("NFC", below[0]))
    class_folders = {unicodedata.normalize("NFC", path.name)
                     for path in folder.glob("*/") if path.name[0] not in ".@"}
    for name in sorted(class_folders - set(class_names)):
        skipped[f"class without images ({name!r})"] += 1
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
        say_once(f"{folder}: skipped {kinds}")
    return files, class_names


# ---- 3. From a file to a tensor ------------------------------------------------------------------
# From an orientation in EXIF to what makes the image upright.
TURN = Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
         6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}


def read_image(path, upright=False):
    """Any file that Pillow reads, as a PIL image in RGB. Transparent pixels become white.

    upright: turn the image as its EXIF orientation says. Annotations refer to pixels as stored.
    Raises ValueError for a file that is damaged or no image.
    """
    try:
        with Image.open(path) as file:
            file.load()  # some formats know size and mode only now
            turn = TURNS.get(orientation(file)) if upright else None
            image = file if turn is None else file.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise any of ten kinds
        raise ValueError(f"{path}: not a readable image ({error})") from None
    try:
        return to_rgb(image)
    except (OSError, ValueError) as error:  # no conversion; an error of ours keeps its traceback
        raise ValueError(f"{path}: not a readable image ({error})") from None


def orientation(file):
    """What the EXIF block of an open image says, 1 to 8; None where the block cannot be read."""
    try:
        return file.getexif().get(0x0112)
    except Exception:  # such a block may stand beside sound pixels
        return None


def to_rgb(image):
    """A PIL image of any mode -> RGB, white where it is transparent."""
    if image.mode.startswith(("I", "F")):
        image = to_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_8_bits(image):
    """A grey image of 16 or 32 bits, which Pillow's convert() would clip at 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > 65535:
        found = f"its pixels are {values.dtype} from {low:g} to {high:g}"
        raise ValueError(f"{found}; expected 8 or 16 bits")
    transparent = values == image.info.get("transparency")  # the value that stands for it, or None
    if high > 255:
        values = values / 256
    values = np.where(transparent, 255, values)
    return Image.fromarray(values.astype(np.uint8))


def test_view(image, S):
    """A PIL image -> S x S: its short side resized to S, then the centre."""
    return T.center_crop(T.resize(image, S), S)


def test_points(points, size, S):
    """Where the test view shows points, an array (n, 2), of an image of size (width, height)."""
    resized = S * np.array(size) // min(size)
    corner = np.round((resized - S) / 2)  # of the crop
    return points * resized / size - corner


def to_tensor(image):
    """A PIL image -> (3, H, W) float32, normalised."""
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3) uint8
    return normalize(pixels.permute(2, 0, 1).contiguous())


def normalize(pixels):
    """(..., 3, H, W) uint8 -> float32 with ImageNet's mean at 0 and its deviation 1."""
    return (pixels.float() - 255 * IMAGENET_MEAN) / (255 * IMAGENET_STD)


def denormalize(image):
    """The way back, for pictures: (..., 3, H, W) normalised floats -> uint8."""
    image = image.float()
    image = image * IMAGENET_STD.to(image) + IMAGENET_MEAN.to(image)
    return (255 * image).round().clamp(0, 255).to(torch.uint8)


class Images(torch.utils.data.Dataset):
    """The images of a folder, and what is known of them.

    split: "train" or "test". To choose settings without test images, "val" is every fourth
    training image of each class and "fit" the others.
    view: "train" is augmented; "test" is test_view; "box" is cropped to the bounding box and
    squashed to S x S, as the part metrics want it (Huang et al. 2023).
    An item: image (3, S, S) float32 normalised, label, key points (M, 3) of x, y, visible, index.
    Key points are in pixels of the view for "test", whole numbers in a square of side frame for
    "box", whatever S is, and in pixels of the file for "train", where nothing needs them.
    """

    def __init__(self, folder, split, view, image_size, seed=0, frame=224):
        if split not in ("train", "fit", "val", "test") or view not in ("train", "test", "box"):
            raise ValueError(f"Images: unknown split {split!r} or view {view!r}")
        self.folder = Path(folder)
        self.view = view
        self.image_size = image_size
        self.seed = seed
        self.frame = frame
        self.epoch = 0  # train.py counts it up: the augmentation depends on it

        classes, parts, files, labels, for_training, boxes, keypoints = read_folder(self.folder)
        self.classes = [name.encode(errors="replace").decode() for name in classes]  # printable
        self.parts = [name.encode(errors="replace").decode() for name in parts]
        rows = [row for row, train in enumerate(for_training) if train == (split != "test")]
        if split in ("val", "fit"):
            kept, seen = [], Counter()
            for row in rows:
                seen[labels[row]] += 1
                is_fourth = seen[labels[row]] % 4 == 0
                if is_fourth == (split == "val"):
                    kept.append(row)
            rows = kept
        if not rows:
            needed = "; a class needs four training images" if split == "val" else ""
            raise ValueError(f"{folder}: no image for split {split!r}{needed}")
        self.files = [files[row] for row in rows]
        self.labels = torch.tensor(labels)[rows]
        self.boxes = torch.tensor(boxes[rows]).float()
        self.keypoints = torch.tensor(keypoints[rows]).float()
        low = boxes[rows, :2]
        high = low + boxes[rows, 2:]
        self.corners = np.trunc(np.stack((low, high), axis=1))  # (n, 2, 2), as Huang et al. do
        self.upright = not self.parts and np.isinf(high).all()  # no annotation refers to pixels

        bilinear = v2.InterpolationMode.BILINEAR
        self.augment = v2.Compose([
            v2.Resize(image_size),
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(90, translate=(0.2, 0.2), scale=(0.8, 1.2), interpolation=bilinear),
            v2.RandomCrop(image_size),
        ])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.item(index, self.read(index))

    def read(self, index):
        try:
            return read_image(self.files[index], self.upright)
        except ValueError as error:
            raise ValueError(f"{error}; python data.py --data {self.folder} names all such files "
                             "of this data") from None

    def item(self, index, image):
        """The item of an image that read() returned. evaluate.py makes two views of each."""
        S = self.image_size
        keypoints = self.keypoints[index].clone()  # (M, 3)
        points = keypoints[:, :2].double().numpy()
        if self.view == "train":
            # A function of (seed, epoch, index): the number of workers has no effect.
            sequence = np.random.SeedSequence((self.seed, self.epoch, index))
            seed = int(sequence.generate_state(1)[0])
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds GPUs, too
                image = self.augment(image)
        elif self.view == "test":
            points = test_points(points, image.size, S)
            inside = ((points >= 0) & (points < S)).all(axis=1)
            keypoints[:, 2] *= torch.from_numpy(inside)
            image = test_view(image, S)
        else:
            low, high = self.corners[index]
            high = np.where(np.isinf(high), image.size, high)
            high = np.maximum(high, low + 1)  # no box is empty
            points = np.trunc(self.frame * (points - low) / (high - low))
            image = image.crop((*low, *high))  # black beyond the image
            image = image.resize((S, S), Image.Resampling.BILINEAR)
        keypoints[:, :2] = torch.from_numpy(points)
        return to_tensor(image), int(self.labels[index]), keypoints, index


# ---- 4. The affine view of the equivariance loss -------------------------------------------------
def sample_affine(generator=None):
    """theta (2, 3) of a random T on the square [-1, 1]^2: p -> theta[:, :2] p + theta[:, 2].

    Rotation up to 90 degrees either way, shift up to 0.11 of the side, scale 0.8 to 1.4.
    """
    draws = 2 * torch.rand(4, generator=generator).double() - 1  # from -1 to 1
    turn, growth, x, y = draws.tolist()
    angle = turn * math.pi / 2
    scale = 1.1 + 0.3 * growth
    cos = scale * math.cos(angle)
    sin = scale * math.sin(angle)
    return torch.tensor([[cos, -sin, 0.22 * x], [sin, cos, 0.22 * y]])  # the side is 2 long


def unwarp(maps, theta):
    """T^-1 on maps (B, K, h, w): what lies at T(p) comes back to p. Bilinear, zeros outside."""
    B, K, h, w = maps.shape
    theta = theta.to(maps, non_blocking=True)  # else the host waits for the GPU here
    grid = F.affine_grid(theta.expand(B, 2, 3), maps.shape, align_corners=False)
    return F.grid_sample(maps, grid, align_corners=False)


def warp(images, theta):
    """T on images (B, C, H, W): what lies at p goes to T(p), so pixels are sampled at T^-1."""
    linear = torch.linalg.inv(theta[:, :2].double())
    shift = -linear @ theta[:, 2:].double()
    return unwarp(images, torch.cat((linear, shift), dim=1))


# ---- 5. What all scripts share: errors, printing, files, devices, processes ----------------------
# A function raises ValueError or OSError with one line: what was found, what was expected, what to
# do. run_script prints that line.
def one_line_parser(**kwargs):
    """An argparse.ArgumentParser that raises ValueError for a wrong option."""
    def error(message):
        raise ValueError(f"{message}; --help lists the options")

    parser = argparse.ArgumentParser(allow_abbrev=False, **kwargs)
    parser.register("type", None, os.path.expanduser)  # ~ in a text that the shell left alone
    parser.error = error
    return parser


# The last line of what a DataLoader raises when /dev/shm, the memory that processes share, is too
# small (the first two) or cannot be written at all (an OSError without a file's name).
LOADER_FAILED = r"</torch_|DataLoader worker|^\[Errno (2|13|30|38)\] [^:]*$"


def run_script(main):
    """Call main(). A user's mistake is one line on stderr and exit code 2, not a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # any name can be printed
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:  # the core files alone, without a folder
        line = f"{error}; take the whole repository"
    except torch.OutOfMemoryError as error:
        line = f"{str(error).splitlines()[0]} Try a smaller --batch-size or --image-size."
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        # From a worker of a DataLoader, the text is a traceback: its last line is the message.
        line = str(error).strip().split("\n")[-1] or type(error).__name__
        line = line.removeprefix(f"{type(error).__name__}: ")
        if re.search(LOADER_FAILED, line):
            line += "; loader processes need /dev/shm: try docker run --shm-size=8g or --workers 0"
        elif isinstance(error, RuntimeError):
            raise
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def say(text):
    """Print at once. A closed pipe, as behind `| head`, does not end a run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@functools.cache  # a run reads its folder several times, and so does each of its processes
def say_once(text):
    if os.environ.get("RANK", "0") == "0":
        say(text)


def save(path, content):
    """Write a text or a torch object beside path, then move it there: path is always whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises the second where a disk is full
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OSError(f"{path}: could not be written ({reason}); is the disk full?") from None


def num_cores():
    """The cores that this process may use: by affinity (taskset, SLURM) and cgroup v2 (Docker)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if CPU_MAX.is_file():
        quota, period = CPU_MAX.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def claim(folder):
    """Locks a run's folder until the file that is returned is closed. Raises ValueError where
    another process holds the lock. Without POSIX locks nothing is locked."""
    lock = (folder / "lock").open("a")
    try:
        import fcntl
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder}: another process trains in this folder; wait for it, or take "
                         "another --out") from None
    except (ImportError, OSError):  # Windows; a file system without locks
        pass
    return lock


def local_device(kind):
    """This process's device: the CPU, or under torchrun a GPU of its own. kind: cpu or cuda."""
    if kind == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"device cuda: {torch.cuda.device_count()} GPUs found; take --device cpu, "
                         "or start fewer processes")
    return torch.device("cuda", local_rank)


def start_processes(device):
    """Joins the processes that torchrun started -> (rank, world); one alone is rank 0 of 1."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", 0)), world


# ---- 6. The command line -------------------------------------------------------------------------

def main():
    parser = one_line_parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="toy", help="toy, cub or a folder")
    parser.add_argument("--data-root", help="the folder of data sets (default ~/.cache/ivpt)")
    args = parser.parse_args()
    folder = find(args.data, args.data_root)
    print(folder)
    damaged = []
    for split in ("train", "test"):
        images = Images(folder, split, "test", 224)
        for index in tqdm(range(len(images)), f"opening {split}", leave=False, disable=None):
            try:
                read_image(images.files[index], images.upright)
            except ValueError as error:
                damaged.append(str(error))
        num_classes = len(images.labels.unique())
        num_boxes = int(images.boxes[:, 2].isfinite().sum())
        print(f"{split}: {len(images)} images of {num_classes} classes, {num_boxes} with a box")
    print(f"parts: {', '.join(images.parts) or 'none, so no consistency and no stability'}")
    for line in damaged:
        print(line, file=sys.stderr)
    if damaged:
        raise ValueError(f"{folder}: {len(damaged)} damaged images; replace or remove them")


if __name__ == "__main__":
    run_script(main)
