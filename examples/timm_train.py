"""timm's train.py as Bayesian distillation: its lines that change, and the run.

    python examples/timm_train.py CHECKOUT --data-dir DATA --model resnet18 --kd-model-name resnet34 \
        --warm-start 90 --burn-in 5 --epochs 120 --sampling-lr 1e-4

CHECKOUT is one of github.com/huggingface/pytorch-image-models, whose own timm is used; the other arguments are the script's own
and those of the last edit. docs/frameworks.md says which posterior is sampled.
"""

import sys
from pathlib import Path

from edited_script import run

VERSION = "train.py of timm v1.0.27 or v1.0.28"

EDITS = {
    "from timm.utils import NativeScaler\n": """\
from timm.utils import NativeScaler
import bkd_fast as bkd
""",
    # 1: the loss, with timm's own teacher
    """\
                # Task handles the complete forward pass and loss computation
                result = task(input, target)
                _loss = result['loss']
""": """\
                result = {'output': model(input)}
                with torch.no_grad():
                    teacher = task.teacher(task.teacher.normalize_input(input, task.student_mean, task.student_std))
                _loss = energy(result['output'], target, teacher)
""",
    "                loss_type=args.kd_loss_type,\n": """\
                loss_type=args.kd_loss_type,
                teacher_pretrained_path=args.kd_weights,
""",
    # 2: the optimizer
    """\
    optimizer = create_optimizer_v2(
        model,
        **optimizer_kwargs(cfg=args),
        **args.opt_kwargs,
    )
""": """\
    optimizer = bkd.SGHMC(
        model.named_parameters(),
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        num_data=len(dataset_train),
        temperature=0.0,
        seed=args.seed,
    )
""",
    # 3: the posterior of the validation images
    "    results = []\n": """\
    smoothing = 0.0 if mixup_active else args.smoothing  # mixup smooths the targets itself
    energy = bkd.KDLoss(args.prior_strength, args.kd_temperature, label_smoothing=smoothing)
    posterior = bkd.PosteriorPredictive(len(dataset_eval), args.num_classes)
    rows = torch.tensor(list(loader_eval.sampler)).split(args.validation_batch_size or args.batch_size)

    @torch.inference_mode()
    def draw():
        for (input, _), places in zip(loader_eval, rows, strict=True):
            posterior.update_logits(eval_model(input.to(device)), places)

    results = []
""",
    "                naflex_mode=naflex_mode,\n": """\
                naflex_mode=naflex_mode,
                energy=energy,
                draw=draw,
""",
    "        naflex_mode=False,\n": """\
        naflex_mode=False,
        energy=None,
        draw=None,
""",
    # after the warm start: noise, a constant lr, batch norm and dropout at rest
    "        for epoch in range(start_epoch, num_epochs):\n": """\
        for epoch in range(start_epoch, num_epochs):
            if epoch >= args.warm_start:
                lr_scheduler = None
                for group in optimizer.param_groups:
                    group.update(temperature=1.0, lr=args.sampling_lr)
""",
    "    trainable_module.train()\n": "    trainable_module.train(epoch < args.warm_start)\n",
    # a draw every so many steps
    "        task.update_ema(step=num_updates)\n": """\
        task.update_ema(step=num_updates)
        if epoch >= args.warm_start + args.burn_in and num_updates % args.draw_every == 0:
            draw()
""",
    "            latest_results = {\n": """\
            posterior.save(os.path.join(args.output, args.experiment, f'posterior_{args.rank}_from_{start_epoch}'))
            latest_results = {
""",
    "# Knowledge Distillation parameters\n": """\
parser.add_argument('--kd-weights', default=None, help='file of a state_dict of the teacher (default: those of timm)')
parser.add_argument('--prior-strength', default=1.0, type=float, help='lambda: what the teacher weighs beside a label')
parser.add_argument('--warm-start', required=True, type=int, help='epochs at temperature 0')
parser.add_argument('--burn-in', required=True, type=int, help='epochs from there to the first draw')
parser.add_argument('--sampling-lr', required=True, type=float, help='lr after the warm start')
parser.add_argument('--draw-every', default=500, type=int, help='steps')

# Knowledge Distillation parameters
""",
}

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/timm_train.py CHECKOUT [arguments of train.py]")
    run(Path(sys.argv[1]) / "train.py", EDITS, VERSION, sys.argv[2:])
