"""The methods that IVPT is compared with, on the same ViT. One file a family, one class a method.

A method is an nn.Module with

    __init__(backbone, num_classes, tune)     a subclass of IVPT: the arguments of IVPT
    rates                                     default learning rates, by option name
    class_specific                            whether every class has prototypes of its own
    forward(images) -> model.Output           class_specific: forward(images, labels=None)
    losses(images, labels)                    -> (dict of losses without their sum, logits)
    parameter_groups(args)                    -> Adam's groups, with the rates of batch size 16
    start(dataset)                            where it needs images to start: called once
    set_epoch(epoch, epochs)                  where it has stages: called before every epoch
    after_epoch(epoch, epochs, dataset)       and after it; dataset: training images, test view

backbone and grid are attributes, as in IVPT. So is prototypes: of each map that is shown, the
number of channels, background last. A subclass of IVPT has no losses of its own. It trains by
those of train.ivpt_losses, or by what of them its loss_weights name. To add a method, write its
class and name it in METHODS.

Figures in docstrings: on cached patches or tokens of the birds of docs/results.md, validation
split, one seed unless said, by scripts that are not in the repository. They led to a choice.
"""
from baselines.prompt_cam import PromptCAM
from baselines.protopnet import Huang, ProtoPNet, ProtoPool, TesNet
from baselines.vpt import E2VPT, GatedVPT, VPTDeep, VPTDeepPrototypes
from model import IVPT, ivpt_arguments

METHODS = {
    "vpt-deep": VPTDeep,
    "vpt-deep-proto": VPTDeepPrototypes,
    "e2vpt": E2VPT,
    "gated-vpt": GatedVPT,
    "prompt-cam": PromptCAM,
    "protopnet": ProtoPNet,
    "huang": Huang,
    "tesnet": TesNet,
    "protopool": ProtoPool,
}


def build_baseline(options, num_classes, backbone):
    """options: those of train.py as a dict; backbone: a VisionTransformer, used, not copied."""
    method = METHODS[options["method"]]
    if issubclass(method, IVPT):
        arguments = ivpt_arguments(options)
    else:
        arguments = dict(tune=options["tune"])
    return method(backbone, num_classes, **arguments)
