"""What a federation must know of every adapter: the one table of it. `fedpeft list adapters` shows it, tests hold it to be true.

Clients k with weights p_k train the tensors theta_k of an adapter whose weight update is Delta W(theta). Averaging is

    exact          Delta W(sum_k p_k theta_k) = sum_k p_k Delta W(theta_k):   Delta W is linear (affine) in what trains
    approximate    off by ||Delta W(mean) - mean Delta W|| / ||mean Delta W||, given for two clients with random tensors,
                   far from each other: an upper end, which shrinks with their distance; strategies that work on the
                   products B A mend it where the adapter is LoRA's two factors
    refused        no average means anything, or this program cannot carry it

A row whose name is not in TABLES["adapter"] runs through others.py with PEFT's own settings. Every type that the installed
PEFT has must have a row: a new one makes a test fail until somebody has looked at it.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class How(Enum):
    """How averaging the parameters of an adapter averages its updates."""

    EXACT = "averages exactly"
    APPROXIMATE = "averages approximately"
    REFUSED = "refused"


class Facts(NamedTuple):
    """One adapter."""

    peft: str  # PEFT's name of the type
    how: How
    trains: str = ""  # what trains, and travels up unless said otherwise
    shared: str = "nothing"  # what does not travel and must be equal everywhere; its digest is in the base's fingerprint
    error: float = 0.0  # the relative error of averaging, as above
    mends: str = ""  # strategies that take the error away
    says: str = ""  # why it is refused
    instead: str = ""  # the nearest that works
    per_example: bool = False  # a closed form of the gradient of each example exists: two factors, each a plain matrix product

    @property
    def sentence(self) -> str:
        """The row in a line."""
        if self.how is How.REFUSED:
            return f"refused: {self.says}; {self.instead}"
        mends = f", exactly with {self.mends}" if self.mends else ""
        off = f" (error {self.error:.2f} for random clients{mends})" if self.how is How.APPROXIMATE else ""
        each = "; has gradients of single examples in closed form" if self.per_example else ""
        return f"{self.how.value}{off}; trains {self.trains}; equal everywhere: {self.shared}{each}"


EXACT, APPROXIMATE, REFUSED = How.EXACT, How.APPROXIMATE, How.REFUSED
PRODUCTS = "ffa_lora, ro_lora, fed_svd, flora or fedex_lora"
PROMPT = "it trains a prompt and no weights, so that there is no update to average", "use adapter lora, or ia3 for very few numbers"

FEDERABLE = {
    # --- with a file of their own
    "lora": Facts("LORA", APPROXIMATE, "A, B", error=0.66, mends=PRODUCTS, per_example=True),
    "lora_fa": Facts("LORA", EXACT, "B", "A, drawn from the seed and compared by digest", per_example=True),
    "lora_sb": Facts("LORA", EXACT, "r x r cores", "A and B, drawn from the seed and compared by digest, or sent by the server"),
    "fora": Facts("LORA", APPROXIMATE, "A, B, gate of the chosen layers", "the choice of layers, sent by the server", 0.86),
    "dora": Facts("LORA", APPROXIMATE, "A, B, magnitudes", error=0.91),
    "bd_lora": Facts("LORA", APPROXIMATE, "A, B in blocks", error=0.66),
    "miss": Facts("MISS", EXACT, "one matrix a layer"),
    "frod": Facts("FROD", EXACT, "lambda, S", "U, V, places of S"),
    "vera": Facts("VERA", APPROXIMATE, "b, d", "random A, B", 0.71),
    "randlora": Facts("RANDLORA", APPROXIMATE, "lambda, gamma", "random A, B", 0.71),
    "unilora": Facts("UNILORA", APPROXIMATE, "theta", "indices", 0.75),
    "vblora": Facts("VBLORA", APPROXIMATE, "vector bank, logits", error=1.1),
    "fourierft": Facts("FOURIERFT", EXACT, "coefficients", "frequencies"),
    "shira": Facts("SHIRA", EXACT, "values", "places"),
    "c3a": Facts("C3A", EXACT, "circulant kernels"),
    "ln_tuning": Facts("LN_TUNING", EXACT, "layer norms"),
    # --- through PEFT's own settings
    "adamss": Facts("ADAMSS", APPROXIMATE, "A, B of each cluster", "clusters and bases of the weights", 0.64),
    "beft": Facts("BEFT", EXACT, "biases"),
    "boft": Facts("BOFT", APPROXIMATE, "rotations in butterfly form", "permutations", 0.44),
    "deft": Facts("DEFT", APPROXIMATE, "P, R", error=0.72),
    "delora": Facts("DELORA", APPROXIMATE, "A, B, lambda", "norms of the weights", 1.0),
    "glora": Facts("GLORA", APPROXIMATE, "five supports a layer", error=0.66),
    "gralora": Facts("GRALORA", APPROXIMATE, "A, B of each block", error=0.63),
    "hira": Facts("HIRA", APPROXIMATE, "A, B", error=0.66),
    "hra": Facts("HRA", APPROXIMATE, "reflections", error=0.73),
    "ia3": Facts("IA3", EXACT, "one scale a row"),
    "loha": Facts("LOHA", APPROXIMATE, "four factors a layer", error=0.87),
    "lokr": Facts("LOKR", APPROXIMATE, "Kronecker factors", error=0.55),
    "oft": Facts("OFT", APPROXIMATE, "rotations", "indices", 1.12),
    "psoft": Facts("PSOFT", APPROXIMATE, "rotation and two vectors in a principal subspace", "the subspaces", 0.45),
    "pvera": Facts("PVERA", APPROXIMATE, "b, d", "random A, B", 0.67),
    "road": Facts("ROAD", APPROXIMATE, "rotation angles and scales", error=0.24),
    "supertuning": Facts("SUPERTUNING", EXACT, "values", "places"),
    "tinylora": Facts("TINYLORA", EXACT, "one vector a layer", "bases and projections"),
    "waveft": Facts("WAVEFT", EXACT, "coefficients", "places"),
    # --- refused
    "adalora": Facts(
        "ADALORA", REFUSED, says="each client would prune other ranks by its own data", instead="use adapter lora, with r by client"
    ),
    "lily": Facts(
        "LILY", REFUSED, says="its routers choose between factors by the input: no weight update to average", instead="use adapter lora"
    ),
    "osf": Facts(
        "OSF", REFUSED, says="it trains the base's own weights and projects gradients by hooks", instead="use adapter lora with init pissa"
    ),
    "peanut": Facts("PEANUT", REFUSED, says="its update is a network and no weight", instead="use adapter lora, or hira for a high rank"),
    "poly": Facts("POLY", REFUSED, says="it needs the number of a task with every example", instead="use adapter lora"),
    "shadow": Facts("SHADOW", REFUSED, says="it trains a second network beside the base", instead="use adapter lora"),
    "trainable_tokens": Facts(
        "TRAINABLE_TOKENS", REFUSED, says="it adds rows to the embedding, which sits below every layer", instead="use adapter lora"
    ),
    "xlora": Facts("XLORA", REFUSED, says="it routes between adapters that are trained already", instead="use adapter lora"),
    "adaption_prompt": Facts("ADAPTION_PROMPT", REFUSED, says=PROMPT[0], instead=PROMPT[1]),
    "cartridge": Facts("CARTRIDGE", REFUSED, says=PROMPT[0], instead=PROMPT[1]),
    "cpt": Facts("CPT", REFUSED, says=PROMPT[0], instead=PROMPT[1]),
    "multitask_prompt_tuning": Facts("MULTITASK_PROMPT_TUNING", REFUSED, says=PROMPT[0], instead=PROMPT[1]),
    "p_tuning": Facts("P_TUNING", REFUSED, says=PROMPT[0], instead=PROMPT[1]),
    "prefix_tuning": Facts("PREFIX_TUNING", REFUSED, says=PROMPT[0], instead=PROMPT[1]),
    "prompt_tuning": Facts("PROMPT_TUNING", REFUSED, says=PROMPT[0], instead=PROMPT[1]),
}
