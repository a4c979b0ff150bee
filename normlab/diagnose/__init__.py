"""What is wrong with a trained model's batch norms, from evidence: causes, costs and cures.

`diagnose` measures a model on data; `findings.MEANINGS` names what it can find. The same from a
command line: `normlab diagnose`. Importing this package alone does not import torch.
"""

from typing import TYPE_CHECKING, Any

from normlab import lazy

if TYPE_CHECKING:  # what __getattr__ finds, for tools that do not run it
    from normlab.diagnose.diagnosis import Diagnosis as Diagnosis
    from normlab.diagnose.diagnosis import diagnose as diagnose
    from normlab.diagnose.findings import MEANINGS as MEANINGS
    from normlab.diagnose.findings import Finding as Finding
    from normlab.diagnose.findings import Severity as Severity
    from normlab.diagnose.findings import verdict as verdict

_OWN = {
    "Diagnosis": "diagnosis", "diagnose": "diagnosis", "MEANINGS": "findings",
    "Finding": "findings", "Severity": "findings", "verdict": "findings",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_OWN)
    if name not in _OWN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lazy.find(__name__, [f"{__name__}.{_OWN[name]}"], name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OWN})
