"""How much the vote of the cls token decides: explore/cls_vote.py --ckpt RUN/last.pt

RUN is a run of train.py --method parts-cls. Printed are its accuracy, that of the concepts' votes
alone, and the share of cls: what its vote adds to the margin between the two likeliest classes, over
the whole margin, both summed over the test images.
"""
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
from methods.parts import PartsAndCls


@torch.inference_mode()
def count_votes(model, images, amp):
    """-> accuracy, accuracy without the vote of cls, its share of the margin; percent."""
    correct = correct_without = 0
    margin = margin_of_cls = 0.0
    for batch, labels, *_ in tqdm(DataLoader(images, 32), leave=False, disable=None):
        scores = evaluate.forward(model, batch, amp=amp).concept_logits.cpu()  # (B, V, C)
        of_concepts = scores[:, :-1].sum(1)
        of_cls = scores[:, -1]
        logits = of_concepts + of_cls  # V times the model's
        correct += (logits.argmax(1) == labels).sum().item()
        correct_without += (of_concepts.argmax(1) == labels).sum().item()
        likeliest = logits.topk(2, dim=1).indices
        first, second = logits.gather(1, likeliest).unbind(1)
        margin += (first - second).sum().item()
        first, second = of_cls.gather(1, likeliest).unbind(1)
        margin_of_cls += (first - second).sum().item()
    n = len(images)
    return 100 * correct / n, 100 * correct_without / n, 100 * margin_of_cls / margin


def main(argv=None):
    parser = data.one_line_parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True, help="last.pt of a run")
    args = parser.parse_args(argv)
    model, checkpoint = evaluate.load_run(args.ckpt)
    if not isinstance(model, PartsAndCls):
        raise ValueError(f"{args.ckpt}: of --method {checkpoint['options']['method']}, expected "
                         "parts-cls; no other method has a vote of cls")
    split = "val" if checkpoint["options"]["validate"] else "test"
    images = evaluate.load_images(checkpoint, split=split)
    accuracy, without, share = count_votes(model, images, checkpoint["options"]["amp"])
    data.say(f"accuracy {accuracy:.1f} % on {len(images)} images, {without:.1f} % by the votes of "
             f"the concepts alone; the vote of cls makes {share:.1f} % of the margin")


if __name__ == "__main__":
    data.run_script(main)
