"""Other people's files of ViT weights, translated to the names of Meta's DINOv2.

    python train.py --data cub --weights FILE.pth    # model.load_backbone calls this where it must

    source                          what differs from Meta's files
    a training checkpoint           the ViT is below "model", "state_dict", "teacher" or "student";
                                    "module." or "backbone." precedes its names, and it has heads
    block_chunks > 0                blocks.CHUNK.N instead of blocks.N
    timm's DINOv2                   reg_token; no mask_token; mlp.fc1 and mlp.fc2 of a SwiGLU; with
                                    registers, cls_token includes its position
    Hugging Face's Dinov2           most names; query, key and value are three layers
    DINO v1, supervised ViTs        no ls1 and ls2: nothing is scaled; no mask_token
    .safetensors                    another file format, which needs the package safetensors

For models without registers timm and Hugging Face also interpolate positions differently. We do it
as Meta does, so at sizes other than 518 pixels tokens can differ from theirs by up to 4 %.
"""
import math
import re

import torch
import torch.nn.functional as F

RENAMED = (  # regular expressions for parts of a name, and what Meta calls them
    # timm
    ("reg_token$", "register_tokens"),
    # Hugging Face
    ("patch_embeddings.projection", "patch_embed.proj"),
    ("position_embeddings", "pos_embed"),
    ("embeddings[.]", ""),
    ("encoder.layer.", "blocks."),
    ("attention.attention.", "attn."),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale(.).lambda1", r"ls\1.gamma"),
    ("mlp.weights_in", "mlp.w12"),
    ("mlp.weights_out", "mlp.w3"),
    ("layernorm", "norm"),
    # training code: chunks of blocks, and wrappers
    (r"blocks\.\d+\.(?=\d)", "blocks."),
    (r"^((module|model|backbone|teacher|dinov2|dinov2_with_registers)\.)+", ""),
)
# What a ViT without heads consists of. storage_tokens are DINOv3's registers.
PARTS = {"cls_token", "mask_token", "register_tokens", "storage_tokens", "pos_embed",
         "patch_embed", "blocks", "norm"}


def to_metas_names(content, path):
    """The content of a file of weights -> the state dict of its ViT in Meta's names, without heads.

    path: of the file, for errors. Raises ValueError where the content is not such a ViT's.
    """
    state = rename(unwrap(content))
    needed = {"cls_token", "pos_embed", "patch_embed.proj.weight"}
    if not needed <= state.keys() or "storage_tokens" in state:
        raise ValueError(f"weights {path}: not a ViT's state dict with learned positions; "
                         "take one of DINOv2's (DINOv3 is not supported)")
    join_qkv(state)
    rename_swiglu(state)
    add_missing(state)
    return state


def unwrap(content):
    """The state dict inside a training checkpoint, or the content itself."""
    if not isinstance(content, dict):
        return {}
    for name in ("model", "state_dict", "teacher", "student"):
        if isinstance(content.get(name), dict):
            content = content[name]
    return content


def rename(content):
    """The ViT's tensors by Meta's names; all others are dropped."""
    state = {}
    for name, x in content.items():
        name = str(name)
        for pattern, metas_name in RENAMED:
            name = re.sub(pattern, metas_name, name)
        if name.split(".")[0] in PARTS:
            state[name] = x
    return state


def join_qkv(state):
    """Hugging Face: the layers query, key and value of a block become one, qkv."""
    for query in [name for name in state if ".attn.query." in name]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        parts = [state.pop(name) for name in names if name in state]
        state[query.replace("query", "qkv")] = torch.cat(parts)


def rename_swiglu(state):
    """timm: a SwiGLU's layers are called like those of an MLP. Its first is twice as wide."""
    fc1 = state.get("blocks.0.mlp.fc1.weight")
    fc2 = state.get("blocks.0.mlp.fc2.weight")
    if fc1 is None or fc2 is None or len(fc1) != 2 * fc2.shape[1]:
        return
    for name in list(state):
        metas_name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state[metas_name] = state.pop(name)


def add_missing(state):
    """What other models lack, with the values at which it has no effect."""
    _, num_positions, width = state["pos_embed"].shape
    if math.isqrt(num_positions) ** 2 == num_positions:  # cls_token includes its position
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    state.setdefault("mask_token", torch.zeros(1, width))
    if "blocks.0.ls1.gamma" not in state:
        for name in [name for name in state if re.search(r"norm[12]\.weight", name)]:
            scale = name.replace("norm", "ls").replace("weight", "gamma")
            state[scale] = torch.ones(width)


def read_safetensors(path, what):
    """The tensors of a .safetensors file by their names. what: weights or checkpoint, for errors.

    Raises ValueError where the file is damaged or the package safetensors is missing.
    """
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ValueError(f"{what} {path}: the package safetensors is missing; "
                         "pip install safetensors, or take a .pth file") from None
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{what} {path}: damaged ({error}); fetch it again") from None
