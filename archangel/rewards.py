"""The implicit rewards of a trained model: log-probabilities of completions beside the reference's.

    python -m archangel.rewards runs/dpo --reference toy --data toy --out rewards.jsonl

For every held-out record (of a file, for every record), one line of JSON: for each of its
completions the number of tokens, `logp` and `reference_logp`, the log-probabilities of the whole
completion by the model and by the reference, in nats. beta * (logp - reference_logp) is the
implicit reward of the losses here. The data need not be what the model was trained on.

With --replies, a file of archangel.sample, also the replies in it, which must be this model's, with
--top_p 1. The mean over them of logp - reference_logp estimates the KL divergence of the model from
the reference, in nats per reply, of replies that are cut at --max_new_tokens.

Printed: the reward accuracy (the share of pairs whose chosen completion has the higher reward)
with its 95% interval, the mean log-ratios, and the KL divergence.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

import common
from archangel.errors import UserError, exit_status
from archangel.judge import json_lines, write
from archangel.records import iter_records
from archangel.run import find_model, load_language_model, load_tokenizer
from archangel.sample import encode_prompts, held_out_source, room_for_prompt, weights_sha256
from archangel.statistics import binomial_interval
from archangel.tokens import LeftOut, RecordEncoder


def read_examples(
    data: str, path: Path, max_length: int
) -> tuple[list[dict], list[common.Example], dict[str, int]]:
    """The held-out records of --data (of a file, all records), as token ids.

    Returns:
        {"place", "names"} of each record, the names being those of its completions; the examples;
        and how many records were left out, by reason.
    """
    encoder = RecordEncoder(load_tokenizer(path))
    rows = []
    texts = []
    left_out = {}
    for place, record, _ in iter_records(held_out_source(data)):
        try:
            texts.append(encoder.render(record))
            rows.append({"place": place})
        except LeftOut as reason:
            left_out[str(reason)] = left_out.get(str(reason), 0) + 1
    kept_rows = []
    examples = []
    for row, tokens in zip(rows, encoder.encode(texts)):
        if not isinstance(tokens, LeftOut):
            longest = max(len(ids) for ids in tokens.completions.values())
            if len(tokens.prompt_ids) + longest > max_length:
                tokens = LeftOut(f"longer than --max_length {max_length}")
        if isinstance(tokens, LeftOut):
            left_out[str(tokens)] = left_out.get(str(tokens), 0) + 1
            continue
        kept_rows.append({**row, "names": list(tokens.completions)})
        examples.append(common.Example(tokens.prompt_ids, list(tokens.completions.values())))
    return kept_rows, examples, left_out


def read_replies(file: Path, path: Path) -> tuple[list[dict], list[common.Example]]:
    """The replies that archangel.sample wrote to a file, by the token ids that were sampled.

    Raises UserError for replies of another model than the one in `path`, or not with --top_p 1.
    """
    config = AutoConfig.from_pretrained(path).get_text_config()
    weights = weights_sha256(path)
    places = []
    replies = []
    for place, reply in json_lines(file, file.read_bytes()):
        if not reply.get("reply_ids") or "sampled" not in reply:
            raise UserError(f"{place}: has no reply_ids; sample it again by archangel.sample")
        if reply["sampled"]["weights_sha256"] != weights:
            raise UserError(f"{place}: is a reply of another model than {path}")
        if reply["sampled"]["top_p"] != 1:
            raise UserError(f"{place}: was not sampled with --top_p 1")
        places.append(place)
        replies.append(reply)
    rows = []
    examples = []
    if replies:
        room = room_for_prompt(config, replies[0]["sampled"]["max_new_tokens"])
        prompts = encode_prompts(replies, load_tokenizer(path), room)  # as they were sampled
        for place, reply, tokens in zip(places, replies, prompts):
            rows.append({"place": place, "names": ["reply"]})
            examples.append(common.Example(tokens.prompt_ids, [reply["reply_ids"]]))
    return rows, examples


@torch.no_grad()
def completion_logps(
    path: Path, examples: Sequence[common.Example], micro_batch_tokens: int
) -> list[list[float]]:
    """Of each example, the log-probabilities of its completions by the model in `path`, in nats.

    In the number format of the trainers: on a GPU in bfloat16, else in float32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What make_micro_batches and prepare_policy read of a common.Run.
    run = SimpleNamespace(
        device=device,
        bfloat16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        rank=0,
        world_size=1,
        layout=common.PaddedLayout(),
        info={},
        config=SimpleNamespace(
            micro_batch_tokens=micro_batch_tokens, activation_checkpointing=False
        ),
    )
    lm = load_language_model(path, torch.float32)
    policy = common.prepare_policy(common.Policy(lm, run.bfloat16), run).to(device)
    sequence = common.Examples()
    for example in examples:
        sequence.append(example)
    logps = [[] for _ in examples]
    progress = tqdm(total=len(examples), desc=f"log-probabilities of {path}", delay=2)
    window = 256  # examples of similar length share a micro-batch; the bar moves this often
    for start in range(0, len(examples), window):
        batch = range(start, min(start + window, len(examples)))
        for micro_batch in common.make_micro_batches(sequence, batch, run):
            sums = micro_batch.sum_completions(policy(micro_batch))  # (C,)
            indices = [batch[place] for place in micro_batch.places.tolist()]
            num_completions = [len(examples[index].completions_ids) for index in indices]
            for index, part in zip(indices, sums.split(num_completions)):
                logps[index] = part.tolist()
            progress.update(len(micro_batch.places))
    progress.close()
    return logps


def score(
    path: Path,
    reference_path: Path,
    rows: Sequence[dict],
    examples: Sequence[common.Example],
    micro_batch_tokens: int,
) -> list[dict]:
    """The rows that are written, in the order of the examples."""
    logps = completion_logps(path, examples, micro_batch_tokens)
    reference_logps = completion_logps(reference_path, examples, micro_batch_tokens)
    scored = []
    for number, (row, example) in enumerate(zip(rows, examples)):
        completions = {}
        for place, name in enumerate(row["names"]):
            completions[name] = {
                "tokens": len(example.completions_ids[place]),
                "logp": logps[number][place],
                "reference_logp": reference_logps[number][place],
            }
        scored.append({"place": row["place"], "completions": completions})
    return scored


def log_ratios(rows: Sequence[dict], name: str) -> list[float]:
    """log pi - log pi_ref of the completions of one name, where a row has it."""
    found = []
    for row in rows:
        if name in row["completions"]:
            completion = row["completions"][name]
            found.append(completion["logp"] - completion["reference_logp"])
    return found


def summarize(rows: Sequence[dict]) -> dict[str, float | list[float]]:
    """Means over the rows; the accuracy if there are pairs, the KL divergence if there are replies.

    A tie counts as one half. Values in nats are of whole completions.
    """
    summary = {}
    for name in ("chosen", "rejected"):
        values = log_ratios(rows, name)
        if values:
            summary[f"log_ratio_{name}"] = statistics.fmean(values)
    pairs = [row for row in rows if {"chosen", "rejected"} <= row["completions"].keys()]
    if pairs:
        differences = np.subtract(log_ratios(pairs, "chosen"), log_ratios(pairs, "rejected"))
        wins = float(np.heaviside(differences, 0.5).sum())
        summary["pairs"] = len(pairs)
        summary["reward_accuracy"] = wins / len(pairs)
        summary["reward_accuracy_95"] = list(binomial_interval(wins, len(pairs), 0.95))
        summary["log_ratio_margin"] = float(differences.mean())
        if len(pairs) > 1:
            summary["log_ratio_margin_se"] = float(differences.std(ddof=1) / len(pairs) ** 0.5)
    replies = log_ratios(rows, "reply")
    if replies:
        summary["replies"] = len(replies)
        summary["kl_of_replies"] = statistics.fmean(replies)
        if len(replies) > 1:
            summary["kl_of_replies_se"] = statistics.stdev(replies) / len(replies) ** 0.5
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Score completions from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.rewards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", help="a folder, `toy`, a short name (pythia-1.4b) or a hub id")
    add("--reference", required=True, metavar="MODEL", help="what it was trained from")
    add("--data", default="toy", help="as the trainers take it; its held-out records (toy)")
    add("--replies", type=Path, help="a file of archangel.sample, with this model's replies")
    add("--out", type=Path, required=True, help="a .jsonl to write")
    add("--max_length", type=int, default=2048, help="longer records are left out (2048)")
    add("--micro_batch_tokens", type=int, default=8192, help="tokens at a time (8192)")
    args = parser.parse_args(arguments)
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: no folder {args.out.parent}")
    disable_progress_bar()  # of transformers, when it loads weights

    path = find_model(args.model)
    reference_path = find_model(args.reference)
    rows, examples, left_out = read_examples(args.data, path, args.max_length)
    for reason, number in left_out.items():
        print(f"{args.data}: {number} records left out: {reason}", file=sys.stderr)
    if args.replies is not None:
        reply_rows, reply_examples = read_replies(args.replies, path)
        rows += reply_rows
        examples += reply_examples
    if not examples:
        raise UserError(f"--data {args.data}: no record can be used")
    scored = score(path, reference_path, rows, examples, args.micro_batch_tokens)
    write(args.out, "".join(json.dumps(row) + "\n" for row in scored))
    print(json.dumps(summarize(scored), indent=2))


if __name__ == "__main__":
    with exit_status():
        main()
