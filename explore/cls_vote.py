"""How much the vote of the cls token decides: explore/cls_vote.py --ckpt RUN/last.pt

RUN is a run of train.py --method parts-cls. Printed are its accuracy, that of the concepts' votes
alone, and the share of cls: what its vote adds to the margin between the two likeliest classes,
over the whole margin, both summed over the test images.
"""
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate


@torch.inference_mode()
def count_votes(model, images, amp):
    """-> accuracy, accuracy without the vote of cls, its share of the margin; percent.

    Raises ValueError where nothing but concepts votes.
    """
    num_concepts = sum(K - 1 for K in model.prototypes)
    correct = correct_without = 0
    margin = margin_of_cls = 0.0
    for batch, labels, *_ in tqdm(DataLoader(images, 32), leave=False, disable=None):
        output = evaluate.forward(model, batch, amp=amp)
        scores = output.concept_logits  # (B, V, C)
        if scores is None or scores.shape[1] != num_concepts + 1:
            raise ValueError("this method has no vote of cls; expected a run of parts-cls")
        scores = scores.cpu()
        of_concepts = scores[:, :-1].sum(1)
        of_cls = scores[:, -1]
        logits = of_concepts + of_cls  # V times the model's
        right = logits.argmax(1) == labels
        right_without = of_concepts.argmax(1) == labels
        correct += right.sum().item()
        correct_without += right_without.sum().item()
        likeliest = logits.topk(2, dim=1).indices
        first, second = logits.gather(1, likeliest).unbind(1)
        margin += (first - second).sum().item()
        first, second = of_cls.gather(1, likeliest).unbind(1)
        margin_of_cls += (first - second).sum().item()
    accuracy = 100 * correct / len(images)
    without = 100 * correct_without / len(images)
    share = 100 * margin_of_cls / margin
    return accuracy, without, share


def main(argv=None):
    parser = data.one_line_parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True, help="last.pt of a run")
    args = parser.parse_args(argv)
    model, checkpoint = evaluate.load_run(args.ckpt)
    options = checkpoint["options"]
    split = "val" if options["validate"] else "test"
    images = evaluate.load_images(checkpoint, split=split)
    accuracy, without, share = count_votes(model, images, options["amp"])
    data.say(f"accuracy {accuracy:.1f} % on {len(images)} images")
    data.say(f"accuracy {without:.1f} % by the votes of the concepts alone")
    data.say(f"the vote of cls makes {share:.1f} % of the margin")


if __name__ == "__main__":
    data.run_script(main)
