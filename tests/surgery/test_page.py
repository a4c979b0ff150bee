import re
from pathlib import Path

import torch

from normlab.norms import GhostBatchNorm

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "your-own-model.md"
README = ROOT / "README.md"


def test_the_page_on_ones_own_model_runs(capsys):
    page = PAGE.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert 2 * len(blocks) == page.count("```")
    names = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out == "Pair(layer='conv1', norm='bn1', obstacle=None)\n"
    assert names["options"] == {"eps": 0.001, "momentum": 0.01}
    assert names["state_dict"].keys() == {f"bn.{name}" for name in names["tensors"]}


def test_the_readme_s_example_runs():
    (block,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    assert max(map(len, block.splitlines())) <= 100
    torch.manual_seed(0)
    names = {}  # nothing but what the block itself imports and makes
    exec(block, names)
    layer = names["model"].bn1
    assert isinstance(layer, GhostBatchNorm)
    assert not layer.running_mean.any()  # neither step nor estimate stayed in it
