"""The last block, found on many architectures, and what is trained when it is named."""

import pytest
import timm
import torch
from torch import nn

import timm_lt
from timm_lt.training.frozen import FrozenParts, last_block

# By the architecture's own code: the last of the repeated blocks in front of the classifier.
BLOCKS = {
    "test_resnet": "layer4.0",
    "test_vit": "blocks.5",
    "test_convnext": "stages.3.blocks.1",
    "test_efficientnet": "blocks.4.0",
    "test_nfnet": "stages.3.0",
    "resnet50": "layer4.2",
    "resnext50_32x4d": "layer4.2",
    "resnet152": "layer4.2",
    "lt_resnet32": "layer3.4",
    "lt_bbn_resnet32": "layer3.4",
    "lt_bbn_resnet50": "layer4.2",
    "lt_oltr_resnet10": "layer4.0",
    "resnetv2_50": "stages.3.blocks.2",
    "convnext_tiny": "stages.3.blocks.2",
    "vit_tiny_patch16_224": "blocks.11",
    "deit_tiny_distilled_patch16_224": "blocks.11",
    "swin_tiny_patch4_window7_224": "layers.3.blocks.1",
    "efficientnet_b0": "blocks.6.0",
    # What follows it there is a 1×1 convolution, no block.
    "mobilenetv3_small_050": "blocks.4.2",
    "mobilenetv2_035": "blocks.6.0",
    "regnety_002": "s4.b7",
    "regnetx_002": "s4.b7",
    "densenet121": "features.denseblock4.denselayer16",
    "inception_v3": "Mixed_7c",
    "mixer_s32_224": "blocks.7",
    "darknet53": "stages.4.blocks.3",
    "crossvit_9_240": "blocks.2",
    "efficientvit_b0": "stages.3.blocks.2",
    "repvgg_a0": "stages.3.0",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_last_block_of_an_architecture(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert last_block(model) == BLOCKS[name]


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (None, "it has no feature_info"),
        ([], "it has no feature_info"),
        ([{"num_chs": 96}], "it has no feature_info"),
        ([{"module": "layer9"}], "its feature_info names layer9, which it does not have"),
        ([{"module": "conv1"}], "conv1 and all before it are single layers"),
    ],
)
def test_what_is_not_known_says_so_and_what_to_do(info, reason):
    model = timm.create_model("test_resnet")
    model.feature_info = info
    model.conv1 = nn.Conv2d(3, 3, 1)
    with pytest.raises(
        timm_lt.UsageError, match=f"{reason}: name the modules in trained, of conv1"
    ):
        last_block(model)


def test_it_is_trained_with_the_classifier_and_nothing_else_is():
    model = timm.create_model("test_convnext", num_classes=3)
    FrozenParts(model, ["last_block"], "frozen")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = ("stages.3.blocks.1.", "head.fc.")
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(expected)}
