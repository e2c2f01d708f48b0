"""Scores to labels: data for kto.py and ppo_offline.py from a number for each completion.

The report (section 7) proposes to take the desirability of a completion from a black box, such as
a toxicity detection API. This reads records as the trainers do and writes unpaired ones,
{"prompt", "completion", "label"}; a pair becomes two of them.

    python -m archangel.labels --data rated.jsonl --score rating --by median --out runs/rated
    python -m archangel.labels --data toy --score archangel.toy:rudeness --lower_is_better \\
        --by threshold --threshold 0 --out runs/civil
    python kto.py --model toy --data runs/civil

--score names where the numbers are from:
    a column            a number for the completion; of a pair, NAME_chosen and NAME_rejected
    module:function     called with prompt and completion (text, or lists of messages), returns the
                        number; True and False are 1 and 0
--by says how a number becomes a label:
    threshold           desirable if it is --threshold or more
    mean, median        the same, with the mean or the median of the training scores
    bernoulli           desirable with a probability equal to the score, which is between 0 and 1
With --lower_is_better, desirable is what has the threshold or less; for bernoulli, the probability
is one minus the score.

The folder gets train.jsonl, test.jsonl if there are held-out records, and counts.json.
"""

import argparse
import importlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from archangel.data import check_out, prepare_mixture, write
from archangel.errors import UserError, exit_status
from archangel.records import (
    TEMPLATE_COLUMNS,
    Source,
    check_record,
    find_sources,
    iter_values,
    progress,
)
from archangel.tokenized import Tally
from archangel.tokens import LeftOut, split_record

RULES = ("threshold", "mean", "median", "bernoulli")
# Takes a raw record, the name of its completion, the prompt and the completion.
ScoreFunction = Callable[[dict, str, object, object], object]


# --------------------------------------------------------------------------------------- the scores


def find_score_function(name: str) -> ScoreFunction:
    """The function that scores a completion, from --score. Raises UserError if there is none."""
    module_name, colon, function_name = name.partition(":")
    if not colon:
        return lambda values, which, prompt, completion: read_column(values, name, which)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--score {name}: {error}") from None
    return lambda values, which, prompt, completion: function(prompt, completion)


def read_column(values: dict, name: str, which: str) -> object:
    """The score in a record's column. Raises KeyError, with the name of the missing column."""
    column = f"{name}_{which}" if which in ("chosen", "rejected") else name
    if column not in values:
        raise KeyError(f"has no column {column}")
    return values[column]


def scored_completions(
    source: Source, score_function: ScoreFunction, left_out: Tally
) -> Iterator[tuple[dict, float]]:
    """Yield (record without a label, score) of every completion. Raises UserError.

    left_out counts the records that cannot be used.
    """
    for where, values in progress(iter_values(source), "score"):
        try:
            record = check_record(values)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        try:
            prompt, completions = split_record(record)
        except LeftOut as reason:
            left_out.add(str(reason), where)
            continue
        shared = {name: record[name] for name in TEMPLATE_COLUMNS if name in record}
        completions.pop("target", None)  # of SFT, which needs no label
        for which, completion in completions.items():
            if not isinstance(completion, str):  # a message
                completion = [completion]
            try:
                score = float(score_function(values, which, prompt, completion))
            except KeyError as error:
                raise UserError(f"{where}: {error.args[0]}") from None
            except Exception as error:  # whatever the function of --score, or float, does
                raise UserError(f"{where}: no score, {type(error).__name__}: {error}") from None
            if not math.isfinite(score):
                raise UserError(f"{where}: the score is {score}, which is not finite")
            yield {"prompt": prompt, "completion": completion, **shared}, score


# --------------------------------------------------------------------------------------- the labels


def find_threshold(scores: Sequence[float], rule: str, threshold: float | None) -> float | None:
    """The score from which a completion is desirable. scores: of the training completions."""
    if rule == "mean":
        return statistics.fmean(scores)
    if rule == "median":
        return statistics.median(scores)
    return threshold


def label_scores(
    scores: Sequence[float],
    rule: str,
    threshold: float | None,
    lower_is_better: bool = False,
    seed: Sequence[int] = (1,),
) -> list[bool]:
    """Whether each completion is desirable.

    Args:
        rule: one of RULES.
        threshold: None for bernoulli.
        seed: of the draws of bernoulli.
    Raises:
        UserError: for bernoulli, if a score is not between 0 and 1.
    """
    if rule != "bernoulli":
        if lower_is_better:
            return [score <= threshold for score in scores]
        return [score >= threshold for score in scores]
    for score in scores:
        if not 0 <= score <= 1:
            raise UserError(f"--by bernoulli: a score is {score:g}, which is not a probability")
    drawn = np.random.default_rng(seed).random(len(scores))  # between 0 and 1, never 1
    if lower_is_better:
        return [number < 1 - score for number, score in zip(drawn.tolist(), scores)]
    return [number < score for number, score in zip(drawn.tolist(), scores)]


def make_labels(args: argparse.Namespace) -> None:
    """Read, score, label and write, by the settings of the command line. Raises UserError."""
    check_out(args.out)
    if args.by == "threshold" and args.threshold is None:
        raise UserError("--by threshold: needs --threshold")
    if args.by != "threshold" and args.threshold is not None:
        raise UserError(f"--by {args.by}: takes no --threshold")
    score_function = find_score_function(args.score)
    prepare_mixture(args.data)
    scored = {}  # split to list of (record, score)
    left_out = Tally()
    for split, source in find_sources(args.data).items():
        scored[split] = list(scored_completions(source, score_function, left_out))
    train_scores = [score for _, score in scored["train"]]
    if not train_scores:
        raise UserError(f"--data: no record can be used; {'; '.join(left_out.describe())}")
    threshold = find_threshold(train_scores, args.by, args.threshold)

    counts = {"score": args.score, "by": args.by, "lower_is_better": args.lower_is_better}
    counts |= {"threshold": threshold, "seed": args.seed, "left_out": left_out}
    labeled = {"train": [], "test": []}
    for number, (split, completions) in enumerate(scored.items()):
        scores = [score for _, score in completions]
        seed = (args.seed, number)
        labels = label_scores(scores, args.by, threshold, args.lower_is_better, seed)
        for (record, _), label in zip(completions, labels):
            labeled[split].append({**record, "label": label})
        counts[split] = {
            "desirable": sum(labels),
            "undesirable": len(labels) - sum(labels),
            "lowest": min(scores, default=None),
            "highest": max(scores, default=None),
        }
    if 0 in (counts["train"]["desirable"], counts["train"]["undesirable"]):
        raise UserError(
            f"--by {args.by}: every training completion gets the same label; the scores are "
            f"between {min(train_scores):g} and {max(train_scores):g}"
        )
    write(args.out, labeled["train"], labeled["test"], counts)
    print_counts(counts, args.out)


def print_counts(counts: dict, out: Path) -> None:
    """Say what was written and what was left out."""
    for line in counts["left_out"].describe():
        print(line)
    for split in ("train", "test"):
        if split in counts:
            found = counts[split]
            line = (
                f"{split}: {found['desirable']:,} desirable, {found['undesirable']:,} undesirable"
            )
            if found["lowest"] is not None:
                line += f"; scores between {found['lowest']} and {found['highest']}"
            print(line)
    if counts["threshold"] is not None:
        print(f"the threshold is {counts['threshold']:g}")
    print(f"the records are in {out}")


# ------------------------------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="as the trainers take it")
    add("--score", required=True, metavar="NAME", help="a column, or module:function")
    add("--by", choices=RULES, required=True, help="how a score becomes a label")
    add("--threshold", type=float, help="for --by threshold")
    add("--lower_is_better", action="store_true", help="low scores are desirable")
    add("--seed", type=int, default=1, help="of the draws of bernoulli (default: %(default)s)")
    add("--out", type=Path, required=True, help="new or empty folder to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Label the records of the command line."""
    make_labels(parse(arguments))


if __name__ == "__main__":
    with exit_status():
        main()
