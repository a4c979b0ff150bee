"""Weights from files: whose they are, what fits, and how the rest is refused."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from normlab import weights
from normlab.models.torchvision_resnet import build
from normlab.norms import GhostBatchNorm


def network(classes: int = 3, depth: int = 18) -> torch.nn.Module:
    norm = partial(GhostBatchNorm, nbs=32)
    return build(norm, num_classes=classes, shape=(3, 32, 32), depth=depth)


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    """torchvision's network, with statistics that are no longer those of the start."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=3)
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if name.endswith(("mean", "var")):
                buffer.add_(torch.rand_like(buffer))
    return net.eval()


@pytest.fixture(scope="module")
def file(theirs: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    return path


def test_torchvisions_state_dict_makes_its_network(file: Path, theirs: torch.nn.Module) -> None:
    ours, x = network().eval(), torch.randn(2, 3, 32, 32)
    assert not torch.equal(ours(x), theirs(x))
    weights.load(ours, str(file))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_digest_is_of_the_tensors_and_not_of_the_file(file: Path, tmp_path: Path) -> None:
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    digest = weights.known(str(file))
    assert re.fullmatch("[0-9a-f]{16}", digest)
    wrapped = {f"module.{name}": value for name, value in reversed(state.items())}
    for key, held in (("model", state), ("state_dict", wrapped)):
        torch.save({key: held, "epoch": 3}, tmp_path / f"{key}.pt")
        assert weights.known(str(tmp_path / f"{key}.pt")) == digest
    moved = state | {"fc.bias": state["fc.bias"] + 1e-6}
    torch.save(moved, tmp_path / "moved.pt")
    assert weights.known(str(tmp_path / "moved.pt")) != digest
    with pytest.raises(ValueError, match=f"holds the weights {digest}, and not weights=0123"):
        weights.known(str(file), "0123")


def test_a_file_that_was_replaced_is_read_again(file: Path, tmp_path: Path) -> None:
    state = torch.load(file, weights_only=True)
    path = tmp_path / "one.pt"
    torch.save(state, path)
    before = weights.known(str(path))
    torch.save({"more": torch.zeros(1), **state}, path)
    assert weights.known(str(path)) != before


def test_a_state_dict_of_before_the_counter_fits(file: Path, tmp_path: Path) -> None:
    state = torch.load(file, weights_only=True)
    plain = {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(plain, tmp_path / "old.pt")
    ours = network()
    weights.load(ours, str(tmp_path / "old.pt"))
    assert torch.equal(ours.state_dict()["bn1.running_var"], state["bn1.running_var"])


@pytest.mark.parametrize(
    ("classes", "depth", "said"),
    [
        (3, 50, "it lacks layer1.0.conv3.weight (and "),
        (5, 18, "fc.weight is (3, 512), the network's (5, 512) (and 1 more such names)"),
    ],
)
def test_another_network_is_refused_by_what_does_not_fit(
    file: Path, classes: int, depth: int, said: str
) -> None:
    said = f"init_from={file} is of another network: {said}"
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        weights.load(network(classes, depth), str(file))
    assert "\n" not in str(refusal.value)


def test_what_holds_no_weights_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "code.pth")  # a pickle that would run code
    for name, said in (
        ("text.pth", "cannot be read as weights"),
        ("code.pth", "cannot be read as weights"),
        ("list.pth", "holds no state_dict"),
        ("none.pth", "holds no state_dict"),
        ("absent.pth", "No such file"),
    ):
        with pytest.raises(ValueError, match=said) as refusal:
            weights.known(str(tmp_path / name))
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)
