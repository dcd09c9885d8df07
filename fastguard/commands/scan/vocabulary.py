"""The vocabulary of training logs: classifies names as metrics, rates, bounds or settings.

Only a metric that is NaN or infinite is a problem. Rates may divide by a time of zero, bounds begin
at infinity, and settings may be NaN or infinite.
"""

from __future__ import annotations

import re
from functools import lru_cache

METRICS = frozenset(
    "loss losses cost costs norm grad grads gradient gradients acc accuracy err error ppl "
    "perplexity mse mae rmse nll elbo kl ce bce score mean std avg average auc iou miou "
    "dice map f1 bleu rouge psnr ssim gnorm reward return entropy lr fitness metric bpb "
    "bpc wer cer logits precision recall objective variance var energy likelihood logprob "
    "advantage critic weight weights bias l1 l2 verlust perte pérdida perda потери потеря "
    "перплексия ошибка 손실".split()
)
_METRICS_WITHOUT_SPACES = ("损失", "損失", "准确率", "梯度", "误差", "誤差", "精度", "困惑度")
_RATES = frozenset(
    "eta sps time times remaining elapsed duration speed throughput second seconds sec secs "
    "ms fps qps flops tflops mfu hfu wps ups tps tgs bandwidth latency wall clock hours "
    "minutes rate power util utilization memory mem gpu cpu watts".split()
)
_SETTINGS = frozenset(
    "missing na fillna ignore city policy fill filler default mask masked pad padding ord posinf "
    "neginf tol "
    "tolerance low high vmin vmax lang language locale encoding user author name host "
    "hostname path file level lvl dataset seed version id task split severity loglevel "
    "strategy sentinel placeholder nodata env code num number count columns arguments argument "
    "copypaste".split()
)
_BOUNDS = frozenset(
    "best max min maximum minimum lowest highest lower upper init initial patience clip old "
    "clipping timeout limit limits threshold mode bound bounds prev previous target goal "
    "record top".split()
)
_BOUNDS_ANYWHERE = frozenset(
    "best patience clip clipping timeout limit threshold bound bounds".split()
)
_SIZES = frozenset(
    "top num epochs steps tokens length len size budget interval every warmup horizon "
    "window deadline workers retries attempts depth capacity rounds".split()
)
_HYPERPARAMETERS = frozenset(
    "alpha beta gamma delta eps epsilon ε kappa lambda rho sigma tau theta temperature cutoff "
    "radius margin ttl".split()
)
_ATTENTION = frozenset("attn attention causal alibi position".split())
_INTERVALS = frozenset("range ranges interval domain bounds".split())
_PARTS = frozenset("processor processors filter warper detector callback".split())
"""Last words of names of program parts, whatever the rest: "logits_processor"."""
_LOSSES = frozenset("loss losses norm norms grad grads gnorm nll ppl perplexity".split())
"""Last words that make any name a metric: "duration loss", "clip_loss"."""

# Words in Latin letters may be in camel case; other scripts may lack spaces.
_WORD = re.compile(r"[A-ZÀ-Þ]?[a-zß-ɏ]+\d?|[A-ZÀ-Þ]+(?![a-zß-ɏ])\d?|\d+|[^\W\d_a-zA-ZÀ-ɏ]+")
_PER = re.compile(
    r"\bper[_ -](?:s|sec|second|step|iter|iteration|batch|epoch|sample|token|gpu|device)\b"
    r"|(?:/|(?<![^\W_]))s(?:ec)?$|\bs/\w{1,12}$|\bms/\w{1,12}$|/(?:sec|second|it|iter|step|hr?|gpu)$",
    re.IGNORECASE,
)
_PRECISION = re.compile(r"(?:.{0,40}[/ _-])?AP(?:\d\d|[sml])?(?:-.{1,40})?")
UNIT_OF_RATE = re.compile(
    r"\s{0,2}(?:\w{1,12}/(?:s|sec|second|it|iter|step|gpu|hr?|min)\b|s/\w{1,12}"
    r"|\w{1,12} per (?:second|sec|step|gpu)\b|(?:ms|secs?|seconds|minutes|hours|hrs|"
    r"[TGM]?flops|(?:KB|MB|GB|KiB|MiB|GiB)(?:/s)?)\b)",
    re.IGNORECASE,
)
"""Units that mark the value before them as a rate or a duration: `inf samples/s`, `nan ms`."""

LEVEL = re.compile(
    r"(?:debug|info|inf|note|notice|warn|warning|error|critical|fatal|hint|tip"
    r"|\w+(?:error|warning|exception))$",
    re.IGNORECASE,
)


@lru_cache(4096)
def words_of(name: str) -> tuple[str, ...]:
    """The words in a name, in lower case.

    Example:
        >>> words_of("train/bestLoss_2"), words_of("VAL_LOSS")
        (('train', 'best', 'loss', '2'), ('val', 'loss'))
    """
    return tuple(word.lower() for word in _WORD.findall(name))


@lru_cache(4096)
def is_metric(name: str) -> bool:
    """Whether a name is a metric that trainers measure."""
    return (
        name.lower() in METRICS
        or any(
            word in METRICS or word.rstrip("0123456789") in METRICS or word.endswith("loss")
            for word in words_of(name)
        )
        or any(word in name for word in _METRICS_WITHOUT_SPACES)
    )


@lru_cache(4096)
def is_rate(name: str) -> bool:
    """Whether a name is a rate or a clock, which does not measure training."""
    if _PER.search(name) is not None:
        return True
    words = words_of(name)
    if not words or words[-1] in _LOSSES:
        return False
    rates = _RATES.intersection((*words, *re.split(r"[^a-z]+", name.lower())))
    return bool(rates) and not (rates == {"rate"} and is_metric(name))


def is_undefined(name: str) -> bool:
    """Whether a name is a metric that is often undefined in a healthy run.

    These are the average precision of COCO, for a size or class without objects, and the explained
    variance, for returns that are all equal.
    """
    return _PRECISION.fullmatch(name) is not None or name.endswith("explained_variance")


@lru_cache(4096)
def is_bound(name: str, text: str) -> bool:
    """Whether a value of this name is a bound at infinity, a rate or a setting.

    Example:
        >>> is_bound("best_acc", "-inf"), is_bound("best_acc", "nan"), is_bound("missing", "nan")
        (True, False, True)
    """
    words = words_of(name)
    if not words:
        return False
    if text != "nan" and _is_infinite_bound(words, text):
        return True
    if is_rate(name) or words[-1] in _PARTS or is_undefined(name) or words == ("error", "score"):
        return True
    return not is_metric(name) and any(word in _SETTINGS for word in words)


def _is_infinite_bound(words: tuple[str, ...], text: str) -> bool:
    # a bound with which a search begins
    if "best" in words or words[-1] == ("min" if text == "inf" else "max"):
        return True
    if not {"min", "max"}.isdisjoint(words) and not any(map(is_metric, {*words} - {"lr"})):
        return True  # one end of a range
    if words[-1] in ("inf", "infinity"):  # a constant such as math.inf
        return True
    if text == "-inf" and words[-1] == "bias" and not _ATTENTION.isdisjoint(words):
        return True
    if words[-1] in _INTERVALS or (text == "-inf" and words[-1] in ("mask", "masks")):
        return True
    if words[0] in _BOUNDS and words[0] not in ("clip", "clipping"):
        return True
    if not words[-1].endswith("loss") and not _BOUNDS_ANYWHERE.isdisjoint(words):
        return True
    if not (_HYPERPARAMETERS.isdisjoint(words) or is_metric(words[-1])):
        return True
    if not _SIZES.isdisjoint(words) and not is_metric(words[-1]):
        return True
    return words[-2:] == ("norm", "type") or words == ("p",)
