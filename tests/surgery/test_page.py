import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your-own-model.md"


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
