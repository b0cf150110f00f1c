"""Methods other than IVPT, on the same ViT. One file a family, one class a method.

To add a method, derive a class from model.Method, which says what train.py, evaluate.py and
explore/ ask of it, and add it to METHODS. It is built as CLASS(backbone, num_classes), with those
of IVPT.arguments that it accepts. A method that changes an idea of IVPT derives from model.IVPT,
as VPTDeepPrototypes does.
"""
from methods.parts import Parts, PartsAndCls
from methods.prompt_cam import PromptCAM
from methods.protopnet import Huang, ProtoPNet, ProtoPool, TesNet
from methods.vpt import E2VPT, GatedVPT, VPTDeep, VPTDeepPrototypes

METHODS = {
    "parts": Parts,
    "parts-cls": PartsAndCls,
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
