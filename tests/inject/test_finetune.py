"""The README's fine-tuning recipe: plain PyTorch, and what it saves needs plain torchvision only."""

import subprocess
import sys

import torch
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.retinanet import RetinaNetClassificationHead

from dropblock_det.inject.inject import regularize_
from dropblock_det.layers import DropBlock2d

SETTINGS = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 96, "score_thresh": 0.0}

# Runs where this package cannot be imported.
ELSEWHERE = """
import sys
sys.modules["dropblock_det"] = None
import torch
from torchvision.models.detection import retinanet_resnet50_fpn

checkpoint, image, detections = sys.argv[1:]
model = retinanet_resnet50_fpn(
    weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96, score_thresh=0.0
)
model.load_state_dict(torch.load(checkpoint, weights_only=True), strict=True)
with torch.no_grad():
    torch.save(model.eval()([torch.load(image, weights_only=True)])[0], detections)
try:
    import dropblock_det
except ImportError:
    print("plain torchvision")
"""


def test_fine_tuning_recipe(tmp_path):
    torch.manual_seed(0)
    torch.save(retinanet_resnet50_fpn(**SETTINGS).state_dict(), tmp_path / "published.pth")

    # The published detector, with a head for the user's two classes (and background).
    model = retinanet_resnet50_fpn(**SETTINGS)
    model.load_state_dict(torch.load(tmp_path / "published.pth", weights_only=True))
    anchors = model.head.classification_head.num_anchors
    model.head.classification_head = RetinaNetClassificationHead(model.backbone.out_channels, anchors, 3)

    handle = regularize_(model, lambda: DropBlock2d(p=0.0, block_size=5), at="paper")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
    images = [torch.rand(3, 64, 80), torch.rand(3, 80, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([k])} for k in (1, 2)]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    steps = 2
    for step in range(steps):
        handle.set_p(0.1 * (step + 1) / steps)
        loss = sum(model.train()(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert all(
        not torch.equal(before[name], p) for name, p in model.named_parameters() if "layer4.2.conv" in name
    )
    torch.save(model.state_dict(), tmp_path / "mine.pth")

    torch.save(images[0], tmp_path / "image.pt")
    script = [sys.executable, "-c", ELSEWHERE]
    paths = [str(tmp_path / name) for name in ("mine.pth", "image.pt", "detections.pt")]
    done = subprocess.run([*script, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "plain torchvision", done.stderr

    with torch.no_grad():
        ours = model.eval()(images[:1])[0]
    theirs = torch.load(paths[2], weights_only=True)
    assert len(theirs["boxes"]) > 0
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value)
