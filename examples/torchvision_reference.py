"""torchvision's classification reference as Bayesian distillation: the lines of its train.py that change, and the run.

    python examples/torchvision_reference.py CHECKOUT --data-path DATA --model resnet18 --teacher resnet34 \
        --teacher-weights resnet34-b627a593.pth --warm-start 90 --burn-in 5 --epochs 120 --sampling-lr 1e-4

CHECKOUT is one of github.com/pytorch/vision, near the installed torchvision's version; the other arguments are the script's own
and those of the last edit. docs/frameworks.md says which posterior is sampled.
"""

import sys
from pathlib import Path

from edited_script import run

VERSION = "references/classification/train.py of torchvision 0.16 to 0.22"

EDITS = {
    "from transforms import get_mixup_cutmix\n": """\
from transforms import get_mixup_cutmix
import bkd_fast as bkd
""",
    # 1: the loss, of the same augmented images
    """\
            loss = criterion(output, target)

        optimizer.zero_grad()
""": """\
            loss = distill(output, target, image)

        optimizer.zero_grad()
""",
    "epoch, args, model_ema=None, scaler=None):\n": "epoch, args, model_ema, scaler, distill, draw):\n",
    "epoch, args, model_ema, scaler)\n": "epoch, args, model_ema, scaler, distill, draw)\n",
    """\
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
""": """\
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    teacher = torchvision.models.get_model(args.teacher, num_classes=num_classes).to(device)
    teacher.load_state_dict(torch.load(args.teacher_weights, map_location=device, weights_only=True))
    teacher.eval().requires_grad_(False)
    energy = bkd.KDLoss(args.prior_strength, args.kd_temperature, label_smoothing=args.label_smoothing)

    def distill(output, target, image):
        return energy(output, target, teacher(image))

    # 3: the posterior of the validation images
    posterior = bkd.PosteriorPredictive(len(dataset_test), num_classes)
    rows = torch.tensor(list(test_sampler)).split(args.batch_size)

    @torch.inference_mode()
    def draw():
        for (image, _), places in zip(data_loader_test, rows, strict=True):
            posterior.update_logits(model(image.to(device)), places)

""",
    # 2: the optimizer
    "        optimizer = torch.optim.SGD(\n": "        optimizer = bkd.SGHMC(\n",
    '            nesterov="nesterov" in opt_name,\n': """\
            num_data=len(dataset),
            temperature=0.0,
""",
    '    parser.add_argument("--opt", default="sgd", type=str, help="optimizer")\n': """\
    parser.add_argument("--opt", default="sgd", choices=["sgd"], help="optimizer")
""",
    # after the warm start: noise, a constant lr, batch norm and dropout at rest
    "    for epoch in range(args.start_epoch, args.epochs):\n": """\
    for epoch in range(args.start_epoch, args.epochs):
        if epoch >= args.warm_start:
            for group in optimizer.param_groups:
                group.update(temperature=1.0, lr=args.sampling_lr)
""",
    "    model.train()\n": "    model.train(epoch < args.warm_start)\n",
    # a draw every so many steps
    "        if model_ema and i % args.model_ema_steps == 0:\n": """\
        if epoch >= args.warm_start + args.burn_in and (i + 1) % args.draw_every == 0:
            draw()

        if model_ema and i % args.model_ema_steps == 0:
""",
    '            utils.save_on_master(checkpoint, os.path.join(args.output_dir, "checkpoint.pth"))\n': """\
            utils.save_on_master(checkpoint, os.path.join(args.output_dir, "checkpoint.pth"))
            posterior.save(os.path.join(args.output_dir, f"posterior_{utils.get_rank()}_from_{args.start_epoch}"))
""",
    '    parser.add_argument("--use-v2", action="store_true", help="Use V2 transforms")\n': """\
    parser.add_argument("--use-v2", action="store_true", help="Use V2 transforms")
    parser.add_argument("--teacher", required=True, help="the teacher's name")
    parser.add_argument("--teacher-weights", required=True, help="file of its state_dict")
    parser.add_argument("--prior-strength", default=1.0, type=float, help="lambda: what the teacher weighs beside a label")
    parser.add_argument("--kd-temperature", default=1.0, type=float, help="of the prior")
    parser.add_argument("--warm-start", required=True, type=int, help="epochs at temperature 0")
    parser.add_argument("--burn-in", required=True, type=int, help="epochs from there to the first draw")
    parser.add_argument("--sampling-lr", required=True, type=float, help="lr after the warm start")
    parser.add_argument("--draw-every", default=500, type=int, help="steps")
""",
}

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/torchvision_reference.py CHECKOUT [arguments of train.py]")
    folder = Path(sys.argv[1]) / "references" / "classification"
    run(folder / "train.py", EDITS, VERSION, sys.argv[2:])
