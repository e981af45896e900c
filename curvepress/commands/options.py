"""The options of ``curvepress quantize``, and what widths of a plan are held to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..quantization.allocation import TARGETS
from ..quantization.bitwidths import PRICES
from ..quantization.requantization import ROUNDINGS
from ..stages.quantizing import EXPORTS

RANGES = ("mse", "minmax", "percentile")
BUDGET = "Budget (one or more)"
BRANCHES = (
    "residual branches (blocks, layers) to leave out whole, those that cost least; with --bits also `auto`: as many as the budget makes "
    "worth while"
)
CHOICE, HOW, TRAINING = "Bits (one way; 8 for all where none is given)", "How", "Training (QAT)"


def one_of(panel: str, what: str, values: Iterable[str]) -> Any:
    """An option that takes one of the values."""

    def checked(value: str | None) -> str | None:
        if value is not None and value not in values:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(values)}")
        return value

    return typer.Option(help=f"{what}: {', '.join(values)}", callback=checked, rich_help_panel=panel)


def _in(panel: str, what: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=what, rich_help_panel=panel, **more)


Whole = Annotated[list[str] | None, _in(BUDGET, "kind or name of groups that stay whole, such as embedding; may be repeated")]
Aligned = Annotated[bool, _in(BUDGET, "hold the query-key and the value width of an attention block equal", "--aligned")]

PlanExamples = Annotated[int, _in(BUDGET, "with --bits or --implants: examples their prices are averaged over", min=2)]
Implants = Annotated[
    bool, _in(BUDGET, "let weights be replaced by two of low rank, where that costs less than channels do; needs no bits", "--implants")
]
Rounds = Annotated[int, _in(BUDGET, "cut, repair and fine-tune so many times, each time scoring what is left anew; channels alone", min=1)]
Exact = Annotated[
    float | None,
    _in(BUDGET, "prove the best plan of channels and bits by integer programming, in so many seconds at most", "--exact", min=0.1),
]
Exchanged = Annotated[
    list[str] | None,
    _in(
        BUDGET,
        "with --bits or --implants: the share of a kind's predicted rises that outlasts recovery, such as channels=0.1; repeated",
        "--exchange",
    ),
]

Source = Annotated[str, typer.Argument(help="a recipe, or the folder of a run, whose compressed model is taken")]
Into = Annotated[Path | None, typer.Option(help="the folder of the run; for the folder of a run by default `quantized` in it")]
Uniform = Annotated[int | None, _in(CHOICE, "bits of every weight, 2 to 8", "--bits", min=2, max=8)]
Average = Annotated[float | None, _in(CHOICE, "mean bits of a weight at most, such as 3.0")]
PackedBytes = Annotated[
    str | None, _in(CHOICE, "bytes of the packed weights at most: a share of float (0.1 or 10%), or a number", "--bytes")
]
Bops = Annotated[str | None, _in(CHOICE, "bit operations at most: a share of float, or a number")]
Rise = Annotated[float | None, _in(CHOICE, "predicted rise of the loss at most, in as few bytes as that takes")]
BitsFile = Annotated[Path | None, _in(CHOICE, "a bits.json, of another run or edited")]
Activations = Annotated[list[int] | None, _in(HOW, "bits of activations that products read, else 8; repeated: a choice, limited by --bops")]
Target = Annotated[str, one_of(HOW, "which bits may be chosen: all, or those that the runtime has kernels for", TARGETS)]
InFloat = Annotated[list[str] | None, _in(HOW, "a weight or site that stays in float; may be repeated", "--float")]
PriceOf = Annotated[str, one_of(HOW, "curvature of weights: along the rounding error, or its mean", PRICES)]
PriceExamples = Annotated[int, _in(HOW, "calibration examples that prices are averaged over", min=2)]
PriceTemperature = Annotated[
    float, _in(HOW, "of the output curvature: above 1 examples the model is sure of count more", "--temperature", min=0.01)
]
Rounding = Annotated[str, one_of(HOW, "how weights are rounded", ROUNDINGS)]
Ranges = Annotated[str, one_of(HOW, "how ranges of activations are found", RANGES)]
Calibration = Annotated[int, _in(HOW, "examples that activations are calibrated on", min=1)]
GroupSize = Annotated[int | None, _in(HOW, "a scale for each run of so many inputs (linear layers)", "--group", min=1)]
Dynamic = Annotated[bool, _in(HOW, "scales of activations from each token (linear layers)", "--dynamic")]
Exports = Annotated[
    list[str] | None,
    _in(HOW, f"what is exported to, and compared there; repeated: {', '.join(EXPORTS)}; else onnx, which always is", "--export"),
]
Asymmetric = Annotated[bool, _in(HOW, "zero points for weights of fewer than 8 bits: better at 2 and 3 bits", "--asymmetric")]
PerTensor = Annotated[bool, _in(HOW, "one scale for each weight, not one for each output channel", "--per-tensor")]
TrainingEpochs = Annotated[int | None, _in(TRAINING, "epochs, else 0", "--epochs", min=0)]
TrainingLr = Annotated[float | None, _in(TRAINING, "learning rate, else 0.002", "--lr")]
Teaching = Annotated[float | None, _in(TRAINING, "weight of learning from the float model, else 0.9", "--distill", min=0, max=1)]
