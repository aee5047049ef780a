"""Why some models of the libraries take no encoding.

By the name of a class of theirs, else by the file that the class is in: the libraries share names of classes (Swin), and a
file of timm or transformers is one architecture.
"""

from __future__ import annotations

from torch import nn

COSINES = "its logits are cosines times a learned temperature, and encodings are made for q.k / sqrt(d)"
CHANNELS = "it attends over channels, which have no position"
KEYS = "its keys are pooled, so queries and keys stand on different grids"
QUERIES = "it pools queries from stage to stage, so queries and keys stand on different grids"
DIFFERENCE = "it subtracts one softmax from another, and an added bias would mean something else in each"
INSIDE = "with features_only a model is wrapped; attach to the one inside, "

BY_CLASS = {
    "FeatureGetterNet": f"{INSIDE}model.model",
    "FeatureHookNet": f'{INSIDE}model["body"]',
    "FeatureListNet": "features_only takes a model apart; make it with feature_cls='getter', attach to model.model",
    "FeatureDictNet": "features_only takes a model apart; make it with feature_cls='getter', attach to model.model",
    "TimmWrapperPreTrainedModel": "it wraps a model of timm; attach to that, model.timm_model",
    "TimmBackbone": "it wraps a model of timm, taken apart for features; make that with timm",
    "DiffAttention": DIFFERENCE,
    "DiffParallelScalingBlock": DIFFERENCE,
    "ParallelScalingBlock": "attention and MLP share one projection, so there is no attention module that could take a bias",
    "ParallelThingsBlock": "a block holds several attentions side by side, and one encoding is made for each layer",
    "ShiftedWindowAttentionV2": COSINES,
    "ShiftedWindowAttention": "its attention is a function that takes no further bias; SwinTransformer of timm takes encodings",
}
BY_FILE = {
    "davit": "half of its layers attend over channels, which have no position",
    "xcit": CHANNELS,
    "edgenext": CHANNELS,
    "swin_transformer_v2": COSINES,
    "swin_transformer_v2_cr": COSINES,
    "swinv2": COSINES,
    "swin2sr": COSINES,
    "mvitv2": KEYS,
    "pvt": KEYS,
    "pvt_v2": KEYS,
    "twins": KEYS,
    "segformer": KEYS,
    "glpn": KEYS,
    "cvt": KEYS,
    "hiera": QUERIES,
    "hieradet_sam2": QUERIES,
    "levit": QUERIES,
    "cait": "its logits are mixed between heads before the softmax, so the bias of one head would reach the others",
    "convit": "its first layers add a softmax of positions to one of content, and a bias would be for one of them alone",
    "volo": "its outlook attention has no keys: weights are projected from the queries",
    "maxxvit": "MaxViT also attends over patches that lie apart, which are no grid; CoAtNet is not written",
    "maxvit": "it also attends over patches that lie apart, which are no grid",
    "csatv2": "one of its attentions is a gate of one channel for convolutions, without heads of queries and keys",
    "dpt": "the attention of its own backbone is not written; DPT with DINOv2 as its backbone_config takes encodings",
    "data2vec_vision": "it has copies of the classes of BEiT, which are not written; BEiT itself takes encodings",
}


def reason(model: nn.Module) -> str:
    """Why a model that no file of this folder knows takes no encoding."""
    parts = list(model.modules())
    known = next((why for part in parts if (why := known_reason(part))), None)
    if known is not None:
        return known
    names = (type(part).__name__ for part in parts)
    attentions = list(dict.fromkeys(name for name in names if "attn" in name.lower() or "attention" in name.lower()))
    if not attentions:
        return "it has no attention, so there is nothing that a position encoding could enter"
    return f"its attention ({', '.join(attentions[:3])}) is none of those that this was written for and tested with"


def known_reason(part: nn.Module) -> str | None:
    """What the tables above say of the class of a module, or of one that it is made of."""
    for each in type(part).__mro__:
        file = each.__module__.rpartition(".")[2].removeprefix("modeling_")
        if (found := BY_CLASS.get(each.__name__) or BY_FILE.get(file)) is not None:
            return found
    return None
