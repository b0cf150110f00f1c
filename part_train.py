# ------------------------------------------------------- the losses, against the table written out

def random_maps(K=4, B=3, h=6, w=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, K, h, w, generator=generator, dtype=torch.float64).softmax(1)


def pool3(A):
    """3 x 3 average, stride 1, no padding, window by window."""
    h, w = A.shape[-2:]
    rows = []
    for y in range(h - 2):
        row = [A[..., y:y + 3, x:x + 3].mean((-1, -2)) for x in range(w - 2)]
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def test_classification_is_the_cross_entropy():
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 1])
    expected = -sum(logits[i].log_softmax(0)[labels[i]] for i in range(3)) / 3
    torch.testing.assert_close(train.classification(logits, labels), expected)


def test_total_variation_presence_and_entropy():
    A = random_maps()
    B, K, h, w = A.shape
    dy = sum((A[:, :, y + 1] - A[:, :, y]).abs().sum() for y in range(h - 1))
    dx = sum((A[..., x + 1] - A[..., x]).abs().sum() for x in range(w - 1))
    torch.testing.assert_close(train.total_variation(A), (dy + dx) / (B * h * w))
    best = [max(pool3(A)[b, k].max() for b in range(B)) for k in range(K - 1)]
    torch.testing.assert_close(train.presence(A), 1 - sum(best) / (K - 1))
    torch.testing.assert_close(train.entropy(A), -(A * A.log()).sum() / (B * h * w))


def test_background_presence_is_the_bce_of_the_best_place_at_the_rim():
    A = random_maps()
    pooled = pool3(A)[:, -1]  # (B, 4, 3)
    total = 0
    for b in range(3):
        places = [pooled[b, i, j] * ((2 * i / 3 - 1) ** 2 + (j - 1) ** 2) / 2
                  for i in range(4) for j in range(3)]
        best = max(places)
        total += F.binary_cross_entropy(best, torch.ones_like(best))
    torch.testing.assert_close(train.background_presence(A), total / 3)


def test_region_consistency_is_kl_and_moves_the_fused_map_only():
    final, fused = random_maps(seed=1).requires_grad_(), random_maps(seed=2).requires_grad_()
    loss = train.region_consistency(final, fused)
    expected = (final * (final / fused).log()).sum() / (3 * 6 * 5)  # B h w patches
    torch.testing.assert_close(loss, expected, atol=1e-8, rtol=1e-8)  # eps 1e-10
    loss.backward()
    assert final.grad is None and fused.grad.abs().sum() > 0
    assert train.region_consistency(final, final.detach()).abs() < 1e-12


def test_equivariance_compares_foreground_maps_by_their_cosine():
    A, back = random_maps(seed=1), random_maps(seed=2)
    cosines = []
    for b in range(3):
        for k in range(3):  # the fourth is the background
            cosines.append((A[b, k] * back[b, k]).sum() / (A[b, k].norm() * back[b, k].norm()))
    torch.testing.assert_close(train.equivariance(A, back), 1 - sum(cosines) / 9)


def test_orthogonality_wants_the_concepts_of_an_image_apart():
    Z = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    expected = 0
    for b in range(2):
        for i in range(4):
            for j in range(4):
                cosine = torch.dot(Z[b, i], Z[b, j]) / (Z[b, i].norm() * Z[b, j].norm())
                expected += (cosine - float(i == j)) ** 2 / 32
    torch.testing.assert_close(train.orthogonality(Z), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_ivpt_losses_are_the_table(recipe):
    """Eight terms of weight 1: maps averaged over five layers, L_con over the four prompted ones."""
    model, images, labels = tiny_ivpt(recipe), torch.randn(3, 3, 70, 70), torch.tensor([0, 4, 2])
    theta = torch.tensor([[0.0, -1.1, 0.1], [1.1, 0.0, -0.05]])
    with torch.no_grad():
        losses, logits = train.ivpt_losses(model, images, labels, theta)
        out, view = model(images), model(data.warp(images, theta))
    A, back = out.attention, [data.unwarp(maps, theta) for maps in view.attention]
    expected = {
        "classification": F.cross_entropy(out.concept_logits.mean(1), labels),
        "region_consistency": sum(train.region_consistency(A[4], f) for f in out.fused) / 4,
        "total_variation": sum(train.total_variation(maps) for maps in A) / 5,
        "presence": sum(train.presence(maps) for maps in A) / 5,
        "background_presence": sum(train.background_presence(maps) for maps in A) / 5,
        "entropy": sum(train.entropy(maps) for maps in A) / 5,
        "equivariance": sum(train.equivariance(a, b) for a, b in zip(A, back)) / 5,
        "orthogonality": train.orthogonality(out.features),
    }
    expected["loss"] = sum(expected.values())
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=lambda text: f"{name}: {text}")
    torch.testing.assert_close(logits, out.logits)


def reached(model, images, term):
    """Names of the parameters that a loss reaches."""
    model.zero_grad(set_to_none=True)
    theta = torch.tensor([[0.8, -0.6, 0.1], [0.6, 0.8, 0.0]])
    losses, _ = train.ivpt_losses(model, images, torch.tensor([0, 1]), theta)
    losses[term].backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name for name, g in gradients.items() if g is not None and g.abs().max() > 0}


def named(model, *patterns):
    names = [name for name, _ in model.named_parameters()]
    return {name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)}


def test_gradient_stops():
    """Which parameters each loss reaches: the stop-gradients of section 3, one by one."""
    model, images = tiny_ivpt("paper").train(), torch.randn(2, 3, 70, 70)
    maps = named(model, "concepts.*")
    fusion = named(model, "fusions.*.norm.*", "fusions.*.head.*")
    head = named(model, "concepts.4.*", "norm.*", "classifier.*")
    for term in ("total_variation", "presence", "background_presence", "entropy", "equivariance"):
        found = reached(model, images, term)
        assert named(model, "concepts.*.prototypes") <= found <= maps, term
    # The grouping learns from L_con alone; the final map is its target and does not move.
    learners = named(model, "concepts.[0-3].*", "fusions.*.grouping.*")
    assert reached(model, images, "region_consistency") == learners
    # Classes reach the fusion heads through the prompts, but no grouping and no prompted prototype.
    assert reached(model, images, "classification") == fusion | head
    assert reached(model, images, "orthogonality") == fusion | head - {"classifier.weight"}
    # The released recipe tunes tokens: classes reach them, losses on maps do not.
    released = tiny_ivpt("released").train()
    tokens = {"backbone.cls_token", "backbone.register_tokens", "backbone.pos_embed"}
    assert tokens <= reached(released, images, "classification")
    assert not tokens & reached(released, images, "entropy")


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_with_the_op_is_training_with_the_formula(recipe, monkeypatch):
    """Ten steps in fp64, with the op and with section 3 as one would write it down."""
    def formula(x, q, b, after, smoothing=0.0, detach_maps=False):
        e = x.detach() if detach_maps else x
        logits = -(e[:, None] - q[:, None]).square().sum(3)  # (B, K, N)
        a = (logits.softmax(1) + b).clamp(min=0) if after else (logits + b).softmax(1)
        if smoothing:
            a = (a + smoothing) / (a + smoothing).sum(1, keepdim=True)
        r = a * F.one_hot(a.argmax(1), len(q)).transpose(1, 2)
        mass = r.sum(2)
        return a, (r @ x) / mass[..., None].clamp(min=1e-300), mass

    def ten_steps():
        model = tiny_ivpt(recipe).double().train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        torch.manual_seed(0)
        values = []
        for _ in range(10):
            images, theta = torch.randn(2, 3, 70, 70).double(), data.sample_affine().double()
            optimizer.zero_grad()
            losses, _ = train.ivpt_losses(model, images, torch.tensor([0, 1]), theta)
            losses["loss"].backward()
            optimizer.step()
            values.append(losses["loss"].item())
        return values

    with_op = ten_steps()
    monkeypatch.setattr(ivpt, "prototype_attention", formula)
    assert ten_steps() == pytest.approx(with_op, rel=1e-6)  # fp32 would give 1e-3


# ------------------------------------------------------------------ options, rates, order of images

TINY_RUN = ["--data", "cub", "--weights", "toy", "--tune", "all", "--image-size", "56",
            "--workers", "0", "--no-amp", "--device", "cpu", "--epochs", "2", "--pretrain", "0"]


@pytest.fixture(scope="module")
def bird_root(tmp_path_factory):
    """8 + 2 drawn birds of each of ten species, as a --data-root."""
    root = tmp_path_factory.mktemp("birds")
    toy_birds.draw(root / "CUB_200_2011", num_train=8, num_test=2)
    return root


def tiny_run(root, out, *more):
    return train.parse([*TINY_RUN, "--data-root", str(root), "--out", str(out), *map(str, more)])


def rates_of(model, optimizer):
    rates = {}
    for name, parameter in model.named_parameters():
        for group in optimizer.param_groups:
            if any(parameter is p for p in group["params"]):
                rates[name] = group["lr"]
    return rates


@pytest.mark.parametrize("recipe, after, mlp, tune, scaled, start, lr_bias", [
    ("paper", True, True, "none", False, "noise", 2e-5),
    ("released", False, False, "tokens", False, "noise", 2e-4),
    ("tuned", True, True, "none", True, "kmeans", 2e-5)])
def test_recipes(recipe, after, mlp, tune, scaled, start, lr_bias):
    args = train.parse(["--data", "cub", "--recipe", recipe])
    assert (args.weights, args.image_size, args.epochs) == ("vitb14_reg4", 518, 25)
    assert (args.batch_size, args.prototypes) == (16, (17, 14, 11, 8, 5))
    assert (args.lr, args.lr_prototypes, args.lr_bias) == (1e-2, 2e-4, lr_bias)
    assert args.start == start and train.parse(["--data", "cub"]).recipe == "paper"
    model = ivpt.build(asdict(args), 10, tiny_backbone())
    for concept in model.concepts:
        assert concept.bias_after_softmax == after and concept.scaled == scaled
    assert isinstance(model.fusions[0].head, nn.Sequential) == mlp and model.tune == tune


def test_presets_give_way_to_what_is_typed():
    args = train.parse(["--data", "/some/where/pets", "--lr", "3e-3", "--recipe", "released"])
    assert (args.weights, args.lr, args.out) == ("vitb14_reg4", 3e-3, "runs/pets")
    assert train.parse(["--data", "cub", "--method", "huang"]).out == "runs/cub_huang"
    args = train.parse(["--bias", "inside", "--epochs", "3"])
    assert (args.data, args.weights, args.bias, args.epochs) == ("toy", "toy", "inside", 3)


def test_rates_follow_the_batch_and_halve_every_four_epochs(bird_root, tmp_path):
    args = tiny_run(bird_root, tmp_path, "--batch-size", 64, "--recipe", "released",
                    "--tune", "tokens")
    model = ivpt.build(asdict(args), 10)
    optimizer, scheduler = train.make_optimizer(model, args)
    assert optimizer.defaults["weight_decay"] == 0 and optimizer.defaults["betas"] == (0.9, 0.999)
    rates = rates_of(model, optimizer)  # twice those of batch 16
    for name in ("classifier.weight", "norm.weight", "fusions.0.grouping.weight"):
        assert rates[name] == 2e-2
    for name in ("concepts.0.prototypes", "concepts.4.bias", "backbone.cls_token"):
        assert rates[name] == 4e-4
    assert "backbone.blocks.0.attn.qkv.weight" not in rates
    first_rates = []
    for _ in range(9):
        first_rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert first_rates == [2e-2] * 4 + [1e-2] * 4 + [5e-3]


def test_every_image_has_its_turn_however_many_processes_share_a_batch(bird_root, tmp_path):
    args = tiny_run(bird_root, tmp_path)
    alone = train.epoch_batches(80, args, 3)
    shared = [train.epoch_batches(80, args, 3, rank, world=2) for rank in range(2)]
    for step in range(5):
        assert sorted(shared[0][step] + shared[1][step]) == sorted(alone[step])
    assert sorted(sum(alone, [])) == list(range(80))
    assert alone != train.epoch_batches(80, args, 4)


def test_a_cpu_leaves_a_core_to_each_loader_process(bird_root, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for workers in (0, 3, 9):
        train.use_cores(tiny_run(bird_root, tmp_path, "--workers", workers))
    assert used == [8, 5, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user's word
    train.use_cores(tiny_run(bird_root, tmp_path))
    assert used == [8, 5, 1]


# ----------------------------------------------------------------------- runs, as a user sees them

def parameters(run):
    return torch.load(run / "last.pt", weights_only=True)["model"]


def log_of(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").open()]
    for line in lines:
        del line["seconds"]
    return lines


def assert_same_run(a, b):
    for name, value in parameters(a).items():
        assert torch.equal(value, parameters(b)[name]), name
    assert log_of(a) == log_of(b)
    assert (a / "metrics.json").read_bytes() == (b / "metrics.json").read_bytes()


def script(name, *arguments, **more):
    """Runs a script as from the shell, on one thread."""
    command = [sys.executable, *([name] if name == "-m" else [str(ROOT / name)])]
    return subprocess.run(command + [str(a) for a in arguments], capture_output=True, text=True,
                          timeout=240, env=dict(os.environ, OMP_NUM_THREADS="1"), **more)


def assert_one_line_error(result, *says):
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for text in says:
        assert text in lines[0], lines[0]


@pytest.fixture
def one_thread():
    """Sums are rounded in another order on another number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_leaves_its_files_and_resumes_bit_for_bit(bird_root, tmp_path, capsys):
    """1 + 1 epochs equal 2: parameters, log and metrics."""
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    metrics = train.train(tiny_run(bird_root, straight))
    train.train(tiny_run(bird_root, halves, "--epochs", 1))
    with pytest.raises(ValueError, match="holds a run.*--resume.*--overwrite"):
        train.train(tiny_run(bird_root, halves))
    with pytest.raises(ValueError, match="seed 42, now 7"):
        train.train(tiny_run(bird_root, halves, "--resume", "--seed", 7))
    train.train(tiny_run(bird_root, halves, "--resume"))
    assert_same_run(straight, halves)
    assert metrics == json.loads((straight / "metrics.json").read_text())
    assert json.loads((straight / "config.json").read_text())["epochs"] == 2
    assert {"epoch", "classification", "loss", "train_accuracy", "lr"} <= set(log_of(straight)[0])
    assert "python evaluate.py --ckpt" in capsys.readouterr().out.splitlines()[-1]


KILLED = """import os, signal, sys
sys.path.insert(0, {root!r})
import data, model, train
affine, replace, calls = data.sample_affine, os.replace, []
def killed_in_a_step():
    calls.append(0)
    if len(calls) == 8 and {where!r} == "step":  # the third step of the second epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return affine()
def killed_while_saving(source, target):
    if len(calls) == 5 and {where!r} == "save" and str(target).endswith("last.pt"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
data.sample_affine, os.replace = killed_in_a_step, killed_while_saving
train.main()
"""


def test_a_kill_at_any_moment_costs_no_more_than_the_epoch(bird_root, tmp_path, one_thread):
    straight, run = tmp_path / "straight", tmp_path / "run"
    train.train(tiny_run(bird_root, straight))
    arguments = [*TINY_RUN, "--data-root", bird_root, "--out", run]
    for where, more in (("step", []), ("save", ["--resume"])):  # both in the second epoch
        (tmp_path / "killed.py").write_text(KILLED.format(root=str(ROOT), where=where))
        result = script(tmp_path / "killed.py", *arguments, *more)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert torch.load(run / "last.pt", weights_only=True)["epoch"] == 1
    train.train(tiny_run(bird_root, run, "--resume"))
    assert_same_run(straight, run)


def test_overwrite_forgets_the_old_run_at_once(bird_root, tmp_path, monkeypatch):
    train.train(tiny_run(bird_root, tmp_path, "--epochs", 1))
    monkeypatch.setattr(data, "sample_affine", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny_run(bird_root, tmp_path, "--overwrite"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "log.jsonl"]
    assert log_of(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="last.pt is not there"):
        train.train(tiny_run(bird_root, tmp_path, "--resume"))


def test_three_non_finite_losses_stop_the_run_and_leave_the_checkpoint(bird_root, tmp_path,
                                                                       monkeypatch, capsys):
    train.train(tiny_run(bird_root, tmp_path, "--epochs", 1))
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(train, "entropy", lambda A: A.sum() * float("nan"))
    with pytest.raises(ValueError, match="three non-finite gradients.*--no-amp"):
        train.train(tiny_run(bird_root, tmp_path, "--resume"))
    assert (tmp_path / "last.pt").read_bytes() == before
    assert capsys.readouterr().err.count("no step taken") == 3


def test_one_bad_batch_is_skipped_and_left_out_of_the_log(bird_root, tmp_path, monkeypatch):
    entropy, calls = train.entropy, []

    def bad_in_the_second_step(A):  # five maps a step
        calls.append(0)
        return entropy(A) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(train, "entropy", bad_in_the_second_step)
    train.train(tiny_run(bird_root, tmp_path, "--epochs", 1))
    assert all(math.isfinite(value) for value in log_of(tmp_path)[0].values())
    assert all(value.isfinite().all() for value in parameters(tmp_path).values())


def test_gradients_are_clipped_and_autocast_is_what_amp_says(bird_root, tmp_path, monkeypatch):
    clip, attend, norms, autocast = nn.utils.clip_grad_norm_, ivpt.Attention.forward, [], []

    def watched_clip(parameters, norm):
        norms.append(norm)
        return clip(parameters, norm)

    def watched_attention(self, *inputs):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return attend(self, *inputs)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched_clip)
    monkeypatch.setattr(ivpt.Attention, "forward", watched_attention)
    one_step = ["--epochs", 1, "--batch-size", 80]
    train.train(tiny_run(bird_root, tmp_path / "fp32", *one_step))
    assert norms == [2.0] and not any(autocast)
    autocast.clear()
    train.train(tiny_run(bird_root, tmp_path / "bf16", *one_step, "--amp"))
    assert all(autocast)


def test_validation_trains_and_evaluates_on_training_images_alone(bird_root, tmp_path):
    metrics = train.train(tiny_run(bird_root, tmp_path, "--epochs", 1, "--validate"))
    assert metrics["protocol"]["split"] == "val" and metrics["protocol"]["images"] == 20
    assert torch.load(tmp_path / "last.pt", weights_only=True)["images"] == 60


def test_the_toy_vit_learns_species_and_pixels_before_training(bird_root, monkeypatch):
    dataset = data.Images(bird_root / "CUB_200_2011", "train", "train", 56)
    backbone = ivpt.load_backbone("toy", 56)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    errors, mse_loss = [], F.mse_loss

    def watched(drawn, pixels):
        errors.append(mse_loss(drawn, pixels))
        return errors[-1]

    monkeypatch.setattr(F, "mse_loss", watched)
    toy_vit.pretrain(backbone, dataset, 6, torch.device("cpu"), amp=False)
    unmoved = {name for name, p in backbone.named_parameters() if torch.equal(p, before[name])}
    assert unmoved == {"mask_token"}
    assert len(errors) == 6 * 5 and sum(errors[-5:]) < 0.8 * sum(errors[:5])


@pytest.mark.parametrize("arguments, says", [
    (["--image-size", "100"], "divisible by the patch"), (["--image-size", "16"], "3 a side"),
    (["--prototypes", "17"], "prototypes"), (["--prototypes", "4", "1"], "prototypes"),
    (["--batch-size", "0"], "--batch-size"), (["--batch-size", "100"], "training images"),
    (["--data", "birds"], "--data"), (["--weights", "nowhere.pth"], "nowhere.pth"),
    (["--resume"], "--resume"), (["--lr", "nan"], "--lr"), (["--seed", "-1"], "--seed"),
    (["--device", "gpu"], "--device"), (["--method", "vpt"], "--method"),
    (["--prototype", "3"], "--help"), (["--recipe", "best"], "--recipe")])
def test_bad_options_are_one_line(arguments, says, bird_root, tmp_path, monkeypatch, capsys):
    command = ["train.py", *TINY_RUN, "--data-root", str(bird_root), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command + arguments)
    with pytest.raises(SystemExit) as end:
        data.run_script(train.main)
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.startswith("error: ") and "\n" not in error
    assert says in error


def test_scripts_from_the_shell(bird_root, tmp_path):
    """train.py, then the command it prints; a second run does not replace the first."""
    run = tmp_path / "run"
    arguments = [*TINY_RUN, "--data-root", bird_root, "--epochs", "1", "--out", run]
    result = script("train.py", *arguments)
    assert result.returncode == 0, result.stderr
    command = result.stdout.strip().splitlines()[-1].split()
    assert command[:2] == ["python", "evaluate.py"]
    metrics = (run / "metrics.json").read_bytes()
    result = script(*command[1:])
    assert result.returncode == 0, result.stderr
    assert "accuracy" in result.stdout and (run / "pictures" / "index.html").is_file()
    assert (run / "metrics.json").read_bytes() == metrics
    assert_one_line_error(script("train.py", *arguments), "--overwrite")


def test_an_unreadable_image_met_by_a_loader_process_is_one_line(bird_root, tmp_path):
    shutil.copytree(bird_root, tmp_path / "birds")
    dataset = data.Images(tmp_path / "birds" / "CUB_200_2011", "train", "train", 56)
    dataset.files[40].write_bytes(dataset.files[40].read_bytes()[:700])
    arguments = [*TINY_RUN, "--data-root", tmp_path / "birds", "--out", tmp_path / "run"]
    result = script("train.py", *arguments, "--workers", "1")
    assert_one_line_error(result, str(dataset.files[40]))


def test_the_seven_files_stand_alone(bird_root, tmp_path):
    """Copied into an empty folder they train and evaluate on a CUB folder."""
    house = tmp_path / "house"
    house.mkdir()
    for name in ("model", "kernels", "data", "train", "evaluate", "test_ivpt"):
        shutil.copy(ROOT / f"{name}.py", house)
    arguments = [*TINY_RUN, "--data-root", bird_root, "--epochs", "1", "--out", "run"]
    for command in (["train.py", *arguments], ["evaluate.py", "--ckpt", "run/last.pt"]):
        result = subprocess.run([sys.executable, *map(str, command)], cwd=house, text=True,
                                capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        assert result.returncode == 0, result.stderr
    assert "consist" in result.stdout


def test_core_files_import_without_posix_modules_and_triton(tmp_path):
    code = ("import sys\nfor name in ('resource', 'fcntl', 'triton'): sys.modules[name] = None\n"
            "import train, evaluate, data, kernels\nassert kernels.triton is None\n")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs 40 real CUB classes and a real ViT-Tiny")
def test_real_features_know_birds():
    """The pretrained ViT reads right: neighbours of cls agree far above chance (1 in 40)."""
    backbone = ivpt.load_backbone(SHARED / "weights" / "vit_tiny_patch16_224.pth", 224)
    features, labels = [], []
    for split, step in (("train", 10), ("test", 25)):
        dataset = data.Images(SHARED / "data" / "CUB_200_2011", split, "test", 224)
        images = torch.stack([dataset[i][0] for i in range(0, len(dataset), step)])
        with torch.no_grad():
            features.append(F.normalize(backbone(images)[:, 0], dim=1))
        labels.append(dataset.labels[::step])
    nearest = labels[0][(features[1] @ features[0].T).argmax(1)]
    assert (nearest == labels[1]).float().mean() > 0.4


TWO_PROCESSES = """import sys
sys.path.insert(0, {root!r})
import torch, data, train
torch.nn.functional.gumbel_softmax = lambda logits, tau: logits.softmax(-1)
data.sample_affine = lambda: torch.tensor([[0.0, 1, 0], [-1, 0, 0]])
train.presence = lambda A: 0 * A.sum()
train.main()
"""


def test_two_processes_train_and_evaluate_like_one(bird_root, tmp_path):
    """torchrun over gloo. Without the two losses that see their own process's images only, the
    gradient equals one process's; rank 0 alone writes; the metrics equal one process's."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    root = tmp_path / "birds"
    shutil.copytree(bird_root, root)
    split = root / "CUB_200_2011" / "train_test_split.txt"
    split.write_text(split.read_text().replace(" 0\n", " 1\n", 1))  # 19 test images: 9 and 10
    (tmp_path / "run.py").write_text(TWO_PROCESSES.format(root=str(ROOT)))
    one_step = [*TINY_RUN, "--data-root", root, "--epochs", "1", "--batch-size", "80", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command in ([tmp_path / "run.py", *one_step, alone],
                    [*torchrun, tmp_path / "run.py", *one_step, run]):
        result = script(*command)
        assert result.returncode == 0, result.stderr[-2000:]
        assert result.stdout.count("accuracy") >= 1
    expected = torch.load(alone / "last.pt", weights_only=True)["optimizer"]["state"]
    found = torch.load(run / "last.pt", weights_only=True)["optimizer"]["state"]
    for i, state in found.items():  # after a single step Adam's first moment is the gradient
        scale = expected[i]["exp_avg"].abs().max().item()
        torch.testing.assert_close(state["exp_avg"], expected[i]["exp_avg"], rtol=1e-3,
                                   atol=1e-3 * scale + 1e-9)
    together = (run / "metrics.json").read_bytes()
    assert json.loads(together)["protocol"]["images"] == 19
    for command in (["evaluate.py"], [*torchrun, ROOT / "evaluate.py"]):
        (run / "metrics.json").unlink()
        result = script(*command, "--ckpt", run / "last.pt")
        assert result.returncode == 0, result.stderr[-2000:]
        assert (run / "metrics.json").read_bytes() == together
