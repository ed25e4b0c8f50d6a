"""Noisy layers, spectral norm and the residual torso: what they compute, by slow formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from asyncrl.env_config import EnvConfig
from asyncrl.envs import make_envs
from asyncrl.evaluate import play_games
from asyncrl.models import ModelConfig
from asyncrl.models.layers import NoisyLinear, SpectralConv2d, noisy_layers, scale
from asyncrl.models.resnet import ImpalaTorso
from asyncrl.models.torsos import NatureTorso, SmallImageTorso

BOX, GREY = spaces.Box(-1, 1, (5,)), spaces.Box(0, 255, (84, 84), np.uint8)
TREE = spaces.Dict({"image": spaces.Box(0, 255, (36, 40), np.uint8), "rest": BOX})


def build(space=BOX, **changes):
    torch.manual_seed(0)
    return ModelConfig(features=16, hidden=(8, 8), **changes)(space, spaces.Discrete(3))


# -- noisy layers --------------------------------------------------------------------------------


def test_factorised_noise_by_a_slow_formula():
    """w = mu + sigma f(e_i) f(e_j), b = mu + sigma f(e_j) with f(x) = sign(x) sqrt(|x|)."""
    torch.manual_seed(0)
    layer = scale(NoisyLinear(4, 3))
    with torch.no_grad():
        layer.bias.uniform_(-1, 1)
        layer.weight_sigma.uniform_(0, 1)
        layer.bias_sigma.uniform_(0, 1)
    torch.manual_seed(7)
    layer.redraw()
    torch.manual_seed(7)
    normal = torch.randn(4).tolist(), torch.randn(3).tolist()
    e_in, e_out = ([np.sign(x) * abs(x) ** 0.5 for x in part] for part in normal)
    features = torch.rand(6, 4)
    want = np.zeros((6, 3))
    for n, j in np.ndindex(6, 3):
        want[n, j] = layer.bias[j].item() + layer.bias_sigma[j].item() * e_out[j]
        for i in range(4):
            noise = layer.weight_sigma[j, i].item() * e_out[j] * e_in[i]
            want[n, j] += (layer.weight[j, i].item() + noise) * features[n, i].item()
    np.testing.assert_allclose(layer(features).detach(), want, rtol=1e-5)


def test_noise_is_drawn_by_redraw_alone_and_silence_leaves_the_means():
    layer, features = NoisyLinear(64, 32), torch.rand(5, 64)
    generator = torch.get_rng_state()
    outputs = layer(features)
    assert torch.equal(outputs, layer(features)) and torch.equal(outputs, layer.eval()(features))
    assert torch.equal(torch.get_rng_state(), generator)
    layer.redraw()
    assert not torch.equal(outputs, layer(features))
    layer.silence()
    plain = torch.nn.functional.linear(features, layer.weight, layer.bias)
    assert torch.equal(layer(features), plain)
    assert torch.equal(layer.weight_sigma, torch.full((32, 64), 0.5 / 8))  # Fortunato et al. 2018


def test_noise_has_the_variance_of_the_paper():
    """f(x) has mean 0 and variance E|x| = sqrt(2 / pi), products of two its square."""
    torch.manual_seed(0)
    layer = NoisyLinear(300, 200)
    products = []
    for _ in range(20):
        layer.redraw()
        products.append(torch.outer(layer.noise_out, layer.noise_in))
    products = torch.stack(products)
    assert abs(products.mean()) < 0.01
    assert products.var().item() == pytest.approx(2 / np.pi, rel=0.05)


@pytest.mark.parametrize(
    "space, torsos", [(BOX, 1), (GREY, 1), (TREE, 2), (spaces.Box(0, 1, (9, 9)), 1)], ids=str
)
@pytest.mark.parametrize("dueling", [False, True])
def test_the_head_and_the_layer_before_it_are_noisy(space, torsos, dueling):
    """Two layers of each stream, or one and the last of each torso; a learner learns the noise."""
    model = build(space, noisy=True, dueling=dueling)
    layers, count = noisy_layers(model), 4 if dueling else torsos + 1
    assert len(layers) == count and model.head.advantage.last in layers
    assert not dueling or model.head.value.last in layers
    assert not noisy_layers(build(space, dueling=dueling))
    names = [name for name in model.state_dict() if name.endswith("noise_in")]
    assert len(names) == count  # published with the weights, saved in checkpoints
    assert sum(name.endswith("sigma") for name, _ in model.named_parameters()) == 2 * count
    recurrent = build(space, noisy=True, dueling=dueling, lstm=8)
    behind = noisy_layers(recurrent.head)
    assert len(behind) == (4 if dueling else 1) and behind == noisy_layers(recurrent)


def test_without_noise_a_noisy_net_is_the_net_of_its_means():
    noisy, plain = build(noisy=True), build()
    plain.load_state_dict(noisy.state_dict(), strict=False)
    obs, first = torch.rand(2, 3, 5), torch.zeros(2, 3, dtype=torch.bool)
    assert not torch.equal(noisy(obs, first, {})[0]["q"], plain(obs, first, {})[0]["q"])
    for layer in noisy_layers(noisy):
        layer.silence()
    torch.testing.assert_close(noisy(obs, first, {})[0]["q"], plain(obs, first, {})[0]["q"])


def test_evaluations_go_without_noise():
    """The same games as with a net of the means; nothing is drawn from torch's generator."""
    envs = make_envs(EnvConfig("CartPole-v1"), 2)
    torch.manual_seed(0)
    space = envs.observation_space, envs.action_space
    noisy = ModelConfig(hidden=(8,), noisy=True)(*space).eval()
    plain = ModelConfig(hidden=(8,))(*space).eval()
    plain.load_state_dict(noisy.state_dict(), strict=False)
    generator = torch.get_rng_state()
    games = [play_games(model, envs, 4, seed=1, epsilon=0.0) for model in (noisy, plain)]
    envs.close()
    assert games[0] == games[1] and torch.equal(torch.get_rng_state(), generator)


# -- spectral norm -------------------------------------------------------------------------------


def largest(weight: torch.Tensor) -> float:
    return torch.linalg.svdvals(weight.detach().flatten(1).double())[0].item()


def test_a_spectral_convolution_has_spectral_norm_1_and_follows_its_weights():
    torch.manual_seed(0)
    layer = SpectralConv2d(8, 16, 3, padding=1, iterations=200)
    assert largest(layer.weight) != pytest.approx(1, abs=0.1)
    assert largest(layer.normalized()) == pytest.approx(1, abs=1e-5)
    image = torch.rand(2, 8, 6, 6)
    want = torch.nn.functional.conv2d(
        image, layer.weight / largest(layer.weight), layer.bias, padding=1
    )
    torch.testing.assert_close(layer(image), want)
    with torch.no_grad():
        layer.weight.mul_(3).add_(0.3 * torch.randn_like(layer.weight))
    for _ in range(200):  # each call in training is one iteration
        layer(image)
    assert largest(layer.normalized()) == pytest.approx(1, abs=1e-5)
    vectors = layer.left.clone(), layer.right.clone()
    outputs = layer.eval()(image)
    assert torch.equal(layer.left, vectors[0]) and torch.equal(layer.right, vectors[1])
    assert torch.equal(outputs, layer(image))


def test_the_gradient_of_a_spectral_convolution_is_that_of_torchs():
    """Vectors are constants; two calls before one backward do not disturb each other."""
    torch.manual_seed(0)
    ours = SpectralConv2d(3, 4, 3, iterations=100)
    plain = torch.nn.Conv2d(3, 4, 3)
    plain.load_state_dict({name: getattr(ours, name).detach() for name in ("weight", "bias")})
    theirs = torch.nn.utils.parametrizations.spectral_norm(plain, n_power_iterations=100)
    image = torch.rand(2, 3, 5, 5)
    outputs = ours(image)
    with torch.no_grad():
        ours(image)
    outputs.square().sum().backward()
    theirs(image).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.parametrizations.weight.original.grad)


# -- the residual torso --------------------------------------------------------------------------


def test_the_residual_torso_by_its_layers():
    """Shapes of each stage for 84 x 84, and a block by hand."""
    torch.manual_seed(0)
    torso = ImpalaTorso(4, 84, 84, width=2, spectral_norm=True, pool=6).eval()
    shapes, image = [], torch.rand(3, 4, 84, 84)
    for layer in torso.convolutions:
        before, image = image, layer(image)
        shapes.append(tuple(image.shape[1:]))
    stages = [(32, 84, 84), (32, 42, 42), (64, 42, 42), (64, 21, 21), (64, 21, 21), (64, 11, 11)]
    for k, stage in enumerate(stages):  # a convolution and a pool, then two blocks like the pool
        assert shapes[4 * (k // 2) + k % 2] == stage
    assert shapes[-3:] == [(64, 6, 6), (64 * 36,), (64 * 36,)]
    assert before.min() < 0 and torch.equal(image, before.clamp(min=0))
    assert torso.features == 64 * 36
    block, image = torso.convolutions[2], torch.randn(1, 32, 5, 5)
    want = image + block.second(block.first(image.clamp(min=0)).clamp(min=0))
    assert torch.equal(block(image), want)
    spectral = [module for module in torso.modules() if isinstance(module, SpectralConv2d)]
    assert len(spectral) == 12  # 15 convolutions, but those that open a stage
    for layer in spectral:
        assert largest(layer.normalized()) == pytest.approx(1, abs=0.1)
        layer.train()
        for _ in range(300):
            layer.iterate()
        assert largest(layer.normalized()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "space, torso, changes",
    [(GREY, "impala", {}), (GREY, "impala", {"torso_width": 2, "torso_pool": 6}),
     (GREY, "impala", {"spectral_norm": True, "noisy": True, "lstm": 8}), (GREY, "nature", {}),
     (GREY, "small", {}), (spaces.Box(0, 255, (40, 44, 3), np.uint8), "impala", {"torso_pool": 4}),
     (spaces.Box(0, 1, (10, 10, 4), np.uint8), "impala", {}), (TREE, "impala", {})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_torsos_by_name(space, torso, changes, precision):
    T, B = 3, 2
    frames = 1 if space is TREE else 2
    model = build(space, torso=torso, frame_stack=frames, **changes)
    kind = {"impala": ImpalaTorso, "nature": NatureTorso, "small": SmallImageTorso}[torso]
    assert sum(isinstance(module, kind) for module in model.modules()) == 1
    space.seed(0)
    samples = [[space.sample() for _ in range(B)] for _ in range(T)]
    if space is TREE:
        obs = {key: torch.from_numpy(np.array([[s[key] for s in row] for row in samples]))
               for key in space.spaces}  # fmt: skip
    else:
        obs = torch.from_numpy(np.array(samples))
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0] = True
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        outputs, _ = model(obs, first, model.initial_state(B))
    outputs["q"][..., 0].sum().backward()
    assert outputs["q"].shape == (T, B, 3) and outputs["q"].dtype == torch.float32
    convolutions = [p for name, p in model.named_parameters() if "convolution" in name]
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in convolutions)


def test_auto_is_nature_for_large_images_and_small_for_others():
    assert isinstance(build(GREY).encoder.torso, NatureTorso)
    assert isinstance(build(spaces.Box(0, 1, (35, 84))).encoder.torso, SmallImageTorso)


def test_refusals():
    for changes, words in (
        ({"torso": "resnet"}, "got 'resnet', 1 and 0"),
        ({"torso": "impala", "torso_width": 0}, "got 'impala', 0 and 0"),
        ({"torso_pool": 6}, "only with torso='impala', got 1, 6 and False with 'auto'"),
        ({"spectral_norm": True, "torso": "nature"}, "only with torso='impala'"),
        ({"noisy": True, "head": "actor_critic"}, "noisy=True and dueling=True with a Q head only"),
        ({"head": "policy"}, "expected head of"),
    ):
        with pytest.raises(ValueError, match=words):
            ModelConfig(**changes)
    with pytest.raises(ValueError, match="at least 36 x 36 for the torso nature, got 35 x 84"):
        build(spaces.Box(0, 1, (35, 84)), torso="nature")
    with pytest.raises(ValueError, match="at most the last map's 11 x 11, got 12"):
        build(GREY, torso="impala", torso_pool=12)
