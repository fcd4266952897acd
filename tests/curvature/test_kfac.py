from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.reference.gradients import row_gradients
from unsee import Denoiser
from unsee.curvature.diagonal import DiagonalFisher
from unsee.curvature.kfac import EKFAC, KFAC, KroneckerCovariances, kronecker_covariances
from unsee.gradients import per_example_gradients

EXAMPLES, DRAWS, TOKENS = 5, 3, 4
NAMES = ("keys.weight", "mix.weight")


class Net(nn.Module):
    """Two weights; the input of the first is the same in all draws, that of the second is not."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(3, 6, bias=False)
        self.mix = nn.Linear(6, 2)
        self.norm = nn.LayerNorm(6)

    def forward(self, text: Tensor, noise: Tensor) -> Tensor:
        """Takes [R, T, 3] and [R, T, 6]."""
        return self.mix((self.keys(text) * noise).tanh()).square().mean((1, 2))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def chosen(net) -> dict[str, nn.Parameter]:
    return {name: net.get_parameter(name) for name in NAMES}


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    text = torch.randn(EXAMPLES, TOKENS, 3).double()
    return text, torch.randn(EXAMPLES, DRAWS, TOKENS, 6).double()


def losses(net: Net, data: tuple[Tensor, Tensor], size: int) -> list[Callable[[], Tensor]]:
    """One function for each batch of `size` examples; it returns [B, D]."""

    def one(text: Tensor, noise: Tensor) -> Tensor:
        rows = net(text.repeat_interleave(DRAWS, 0), noise.flatten(0, 1))
        return rows.unflatten(0, (-1, DRAWS))

    pairs = zip(data[0].split(size), data[1].split(size), strict=True)
    return [lambda pair=pair: one(*pair) for pair in pairs]


def seen_by_layers(net: Net, text: Tensor, noise: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients [T, features] of one draw, layer by layer as it is written."""
    keys = text @ net.keys.weight.T
    state = (keys * noise).tanh()
    mixed = state @ net.mix.weight.T + net.mix.bias
    g_keys, g_mixed = torch.autograd.grad(mixed.square().mean(), [keys, mixed])
    return {"keys.weight": (text, g_keys), "mix.weight": (state.detach(), g_mixed)}


def outer(vectors: list[Tensor]) -> Tensor:
    """Mean of v vᵀ over single vectors."""
    return torch.stack([torch.outer(v, v) for v in vectors]).mean(0)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """In float64, other summation orders of a few hundred terms differ by some 1e-15 relative."""
    assert found.dtype == torch.float64
    atol = 1e-13 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=atol)


def fit(
    net: Net, data: tuple[Tensor, Tensor], size: int = 2, gradient="averaged"
) -> tuple[KroneckerCovariances, EKFAC]:
    chosen = {name: net.get_parameter(name) for name in NAMES}
    batches = losses(net, data, size)
    covariances = kronecker_covariances(net, chosen, batches, gradient)
    gradients = (per_example_gradients(net, chosen, loss, gradient) for loss in batches)
    return covariances, EKFAC.fit(covariances, gradients, {"a": 1})


def test_per_draw_covariances_one_draw_at_a_time(net, chosen, data):
    found = kronecker_covariances(net, chosen, losses(net, data, 2))
    draws = [
        seen_by_layers(net, data[0][i], data[1][i, d])
        for i in range(EXAMPLES)
        for d in range(DRAWS)
    ]
    assert found.count == EXAMPLES * DRAWS and found.gradient == "per_draw"
    for name in NAMES:
        assert found.tokens[name] == TOKENS
        assert_close(found.inputs[name], outer([a for one in draws for a in one[name][0]]))
        assert_close(found.outputs[name], outer([g for one in draws for g in one[name][1]]))


def test_averaged_covariances_one_example_at_a_time(net, chosen, data):
    """Same input in all draws: one mean gradient for each token. Otherwise: more tokens."""
    found = kronecker_covariances(net, chosen, losses(net, data, 2), "averaged")
    examples = [
        [seen_by_layers(net, data[0][i], data[1][i, d]) for d in range(DRAWS)]
        for i in range(EXAMPLES)
    ]
    assert found.count == EXAMPLES and found.gradient == "averaged"
    assert found.tokens == {"keys.weight": TOKENS, "mix.weight": TOKENS * DRAWS}
    assert_close(found.inputs["keys.weight"], outer(list(data[0].flatten(0, 1))))
    means = [torch.stack([one["keys.weight"][1] for one in e]).mean(0) for e in examples]
    assert_close(found.outputs["keys.weight"], outer([g for mean in means for g in mean]))
    mixed = [one["mix.weight"] for e in examples for one in e]
    assert_close(found.inputs["mix.weight"], outer([a for one in mixed for a in one[0]]))
    assert_close(found.outputs["mix.weight"], outer([g / DRAWS for one in mixed for g in one[1]]))


@pytest.mark.parametrize("gradient", ["per_draw", "averaged"])
def test_values_are_squares_in_the_eigenbasis(net, chosen, data, gradient):
    covariances, curvature = fit(net, data, gradient=gradient)

    def loss() -> Tensor:
        values = losses(net, data, EXAMPLES)[0]()
        return values.mean(1) if gradient == "averaged" else values.flatten()

    assert curvature.gradient == gradient and curvature.settings == {"a": 1}
    assert curvature.count == (EXAMPLES if gradient == "averaged" else EXAMPLES * DRAWS)
    for name, rows in row_gradients(loss, chosen).items():
        q_a, q_g = curvature.input_vectors[name], curvature.output_vectors[name]
        for q, covariance in (q_a, covariances.inputs), (q_g, covariances.outputs):
            assert_close(q.T @ q, torch.eye(len(q)).double())
            rotated = q.T @ covariance[name] @ q
            # rounding of eigh is relative to the largest eigenvalue
            off = rotated - rotated.diag().diag()
            assert off.abs().max() < 1e-13 * rotated.max()
        squares = [(q_g.T @ row @ q_a) ** 2 for row in rows]
        assert_close(curvature.values[name], torch.stack(squares).mean(0))


@pytest.mark.parametrize("gradient", ["per_draw", "averaged"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_batch_size_does_not_matter(net, data, gradient, size):
    whole, _ = fit(net, data, EXAMPLES, gradient)
    parts, _ = fit(net, data, size, gradient)
    assert parts.tokens == whole.tokens and parts.count == whole.count
    # The eigenvectors' signs are free, so that Λ and steps are compared, not rotations.
    step = {name: torch.ones(whole.outputs[name].shape[0], whole.inputs[name].shape[0]).double()
            for name in NAMES}  # fmt: skip
    for name in NAMES:
        assert_close(parts.inputs[name], whole.inputs[name])
        assert_close(parts.outputs[name], whole.outputs[name])
    a, b = fit(net, data, size, gradient)[1], fit(net, data, EXAMPLES, gradient)[1]
    for name in NAMES:
        # Eigenvectors move by the rounding of the covariances over the gaps of eigenvalues.
        torch.testing.assert_close(a.values[name], b.values[name], rtol=1e-8, atol=0)
        found, expected = a.precondition(step)[name], b.precondition(step)[name]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("damping", [0.1, 3.0])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_preconditioning_solves_with_the_dense_matrix(net, data, damping, kind):
    covariances, ekfac = fit(net, data)
    curvature = ekfac if kind is EKFAC else KFAC.fit(covariances)
    torch.manual_seed(2)
    for name in NAMES:
        shape = curvature.values[name].shape
        gradients = torch.randn(7, *shape).double()
        if kind is EKFAC:
            # row-major: the flat weight's basis is kron(Q_G, Q_A)
            basis = torch.kron(ekfac.output_vectors[name], ekfac.input_vectors[name])
            dense = basis @ ekfac.values[name].flatten().diag() @ basis.T
        else:
            factors = covariances.outputs[name].contiguous(), covariances.inputs[name].contiguous()
            dense = covariances.tokens[name] * torch.kron(*factors)
        dense += damping * dense.diag().mean() * torch.eye(len(dense)).double()
        expected = torch.linalg.solve(dense, gradients.flatten(1).T).T.reshape(gradients.shape)
        found = curvature.precondition({name: gradients}, damping)[name]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max())
        alone = curvature.precondition({name: gradients[2]}, damping)[name]
        assert_close(alone, found[2])


def test_rotated_gradients_serve_for_any_damping(net, data):
    _, curvature = fit(net, data)
    torch.manual_seed(2)
    for name in NAMES:
        shape = curvature.values[name].shape
        one, many = torch.randn(shape).double(), torch.randn(7, *shape).double()
        a, b = curvature.rotate({name: one})[name], curvature.rotate({name: many})[name]
        assert_close(b.square().sum((1, 2)), many.square().sum((1, 2)))
        for damping in (0.01, 0.1, 1.0):
            values = curvature.values[name]
            found = (a / (values + damping * values.mean()) * b).sum((1, 2))
            step = curvature.precondition({name: one}, damping)[name]
            torch.testing.assert_close(found, (step * many).sum((1, 2)), rtol=1e-10, atol=1e-8)


def test_float32_stays_float32(net, data):
    _, curvature = fit(net, data)
    torch.manual_seed(2)
    gradients = {n: torch.randn(3, *v.shape) for n, v in curvature.values.items()}
    exact = curvature.precondition({n: g.double() for n, g in gradients.items()})
    for name, found in curvature.precondition(gradients).items():
        assert found.dtype == torch.float32
        # four products of six terms in float32
        scale = exact[name].abs().max()
        torch.testing.assert_close(found.double(), exact[name], rtol=0, atol=1e-5 * float(scale))
        assert curvature.rotate(gradients)[name].dtype == torch.float32


def test_squares_of_small_gradients_do_not_underflow():
    """Λ of 1e-50 is zero in float32."""
    covariances = KroneckerCovariances(
        {"w": torch.eye(1).double()}, {"w": torch.eye(1).double()}, {"w": 1.0}, "per_draw", 1
    )
    gradient = {"w": torch.full((1, 1, 1), 1e-25)}
    step = EKFAC.fit(covariances, [gradient]).precondition(gradient, 0)["w"]
    # 1e-25 itself is rounded to 7 digits in float32
    torch.testing.assert_close(step, torch.full((1, 1, 1), 1e25), rtol=1e-6, atol=0)


def linear_losses(net: nn.Linear, inputs: Tensor, functionals: Tensor):
    return lambda: (net(inputs) * functionals).sum(1)


def linear_fits(net: nn.Linear, inputs: Tensor, functionals: Tensor) -> tuple[KFAC, EKFAC, Tensor]:
    """Both curvatures and the full Fisher matrix [P, P] of losses that are linear in the output."""
    chosen, loss = {"weight": net.weight}, linear_losses(net, inputs, functionals)
    covariances = kronecker_covariances(net, chosen, [loss])
    rows = row_gradients(loss, chosen)["weight"].flatten(1)
    ekfac = EKFAC.fit(covariances, [per_example_gradients(net, chosen, loss)])
    return KFAC.fit(covariances), ekfac, rows.T @ rows / len(rows)


def dense_step(fisher: Tensor, gradient: Tensor, damping: float) -> Tensor:
    damped = fisher + damping * fisher.diag().mean() * torch.eye(len(fisher)).double()
    return torch.linalg.solve(damped, gradient.flatten()).reshape(gradient.shape)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_independent_inputs_and_gradients_are_exact(damping):
    """Every input with every output gradient: the Fisher is a Kronecker product."""
    torch.manual_seed(0)
    net = nn.Linear(3, 4, bias=False).double()
    x, c = torch.randn(5, 3).double(), torch.randn(6, 4).double()
    pairs = list(itertools.product(range(5), range(6)))
    kfac, ekfac, fisher = linear_fits(net, x[[i for i, _ in pairs]], c[[j for _, j in pairs]])
    gradient = torch.randn(4, 3).double()
    expected = dense_step(fisher, gradient, damping)
    for curvature in kfac, ekfac:
        step = curvature.precondition({"weight": gradient}, damping)["weight"]
        torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_uncorrelated_weights_are_exact_in_ekfac_only(damping):
    """One weight in each gradient: a diagonal Fisher, but no product of two scales."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2, bias=False).double()
    pairs = list(itertools.product(range(3), range(2)))
    x = torch.eye(3).double()[[i for i, _ in pairs]]
    c = torch.eye(2).double()[[j for _, j in pairs]] * torch.rand(6, 1).double()
    kfac, ekfac, fisher = linear_fits(net, x, c)
    gradient = torch.randn(2, 3).double()
    expected = dense_step(fisher, gradient, damping)
    step = ekfac.precondition({"weight": gradient}, damping)["weight"]
    torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-10)
    other = kfac.precondition({"weight": gradient}, damping)["weight"]
    assert not torch.allclose(other, expected, rtol=1e-2)


def test_independent_tokens_add_up_in_kfac():
    """Tokens whose gradients have random signs: the mean Λ of K-FAC is that of EK-FAC."""
    net = nn.Linear(2, 2, bias=False).double()
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3))).double()  # [8, 3]
    torch.manual_seed(0)
    x = torch.randn(3, 2).double().expand(8, 3, 2)
    chosen = {"weight": net.weight}

    def loss() -> Tensor:
        return (net(x).sum(2) * signs).sum(1)

    covariances = kronecker_covariances(net, chosen, [loss])
    ekfac = EKFAC.fit(covariances, [per_example_gradients(net, chosen, loss)])
    assert_close(KFAC.fit(covariances).values["weight"].sum(), ekfac.values["weight"].sum())


@pytest.mark.parametrize("gradient", ["per_draw", "averaged"])
def test_random_functionals_give_the_gauss_newton_matrix(gradient):
    """All signs in place of normal noise have its second moment exactly.

    The network is linear: the Gauss-Newton matrix is the Hessian of the mean squared error.
    """
    torch.manual_seed(0)
    net = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(2, 3).double()  # two draws of one example, [D, in]
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))).double()
    signs = signs.unflatten(1, (2, 2))  # [16, D, out]
    chosen = {"weight": net.weight}

    def functionals() -> Tensor:
        outputs = net(x.repeat(16, 1)).unflatten(0, (16, 2))
        values = (2 / 2) ** 0.5 * (outputs * signs).sum(2)
        return values * 2**0.5 if gradient == "averaged" else values

    rows = per_example_gradients(net, chosen, functionals, gradient)["weight"].flatten(1)

    def mean_squared_error(weight: Tensor) -> Tensor:
        return (x @ weight.unflatten(0, (2, 3)).T - 1).square().mean()

    hessian = torch.autograd.functional.hessian(mean_squared_error, net.weight.detach().flatten())
    assert_close(rows.T @ rows / len(rows), hessian)


def test_keys_of_an_attention_see_centred_inputs():
    """A constant in all inputs of a row changes no gradient, nor the centred covariance."""
    torch.manual_seed(0)
    net = nn.Linear(3, 4, bias=False).double()
    text, shift = torch.randn(6, 5, 3).double(), torch.randn(6, 1, 3).double()
    asked, values = torch.randn(6, 4).double(), torch.randn(6, 5).double()
    chosen = {"weight": net.weight}

    def loss(x: Tensor) -> Callable[[], Tensor]:
        return lambda: ((net(x) @ asked[:, :, None])[..., 0].softmax(1) * values).sum(1)

    plain, moved = (
        kronecker_covariances(net, chosen, [loss(x)], centre_inputs=["weight"])
        for x in (text, text + shift)
    )
    centred = text - text.mean(1, keepdim=True)
    assert_close(plain.inputs["weight"], outer(list(centred.flatten(0, 1))))
    torch.testing.assert_close(moved.inputs["weight"], plain.inputs["weight"], rtol=1e-12, atol=0)
    one, other = (per_example_gradients(net, chosen, loss(x)) for x in (text, text + shift))
    torch.testing.assert_close(one["weight"], other["weight"], rtol=1e-9, atol=1e-13)
    raw = kronecker_covariances(net, chosen, [loss(text)])
    assert not torch.allclose(raw.inputs["weight"], plain.inputs["weight"])
    assert_close(raw.outputs["weight"], plain.outputs["weight"])


def test_a_denoiser_that_projects_its_text_once(tiny_pipeline):
    """Keys and values see one row for all draws of an example: the same as a row for each."""
    model = Denoiser.from_pipeline(tiny_pipeline, parameters="cross-attn-kv")
    torch.manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    timesteps, noise = torch.tensor([[0, 500, 999], [1, 2, 700]]), torch.randn(2, 3, 4, 8, 8)

    def repeated() -> Tensor:
        rows = (t.repeat_interleave(3, 0) for t in (latents, text))
        flat = model.loss(*rows, timesteps.reshape(6, 1), noise.flatten(0, 1)[:, None])
        return flat.unflatten(0, (2, 3))[..., 0]

    shared = lambda: model.loss(latents, text, timesteps, noise)  # noqa: E731
    keys = [name for name in model.parameters if "to_k" in name]
    with model.gradients_on():
        once, each = (
            kronecker_covariances(model.network, model.parameters, [loss], "averaged", keys)
            for loss in (shared, repeated)
        )
        gradients = per_example_gradients(model.network, model.parameters, shared, "averaged")
        expected = row_gradients(lambda: shared().mean(1), model.parameters)
    assert once.tokens == each.tokens == dict.fromkeys(model.parameters, 7)
    for name in model.parameters:
        # the network runs in float32
        for a, b in (
            (once.inputs[name], each.inputs[name]),
            (once.outputs[name], each.outputs[name]),
            (gradients[name].double(), expected[name]),
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))


def test_inputs_equal_but_for_rounding_are_the_same(net, chosen, data):
    """The layer before may have computed them row by row."""
    text, noise = data
    rows = text.repeat_interleave(DRAWS, 0)
    rows = rows * (1 + 1e-9 * torch.randn_like(rows))
    found = kronecker_covariances(
        net, chosen, [lambda: net(rows, noise.flatten(0, 1)).unflatten(0, (-1, DRAWS))], "averaged"
    )
    assert found.tokens == {"keys.weight": TOKENS, "mix.weight": TOKENS * DRAWS}


def test_parameters_may_come_in_turn(net, data):
    """Stored gradients are read one parameter at a time."""
    covariances, whole = fit(net, data)
    chosen = {name: net.get_parameter(name) for name in NAMES}
    rows = per_example_gradients(net, chosen, losses(net, data, EXAMPLES)[0], "averaged")
    parts = EKFAC.fit(covariances, ({name: row} for name in NAMES for row in rows[name].split(2)))
    for name in NAMES:
        assert_close(parts.values[name], whole.values[name])
    assert parts.count == EXAMPLES


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_save_and_load_keep_every_bit(net, data, tmp_path: Path, kind):
    covariances, ekfac = fit(net, data)
    curvature = ekfac if kind is EKFAC else KFAC.fit(covariances, {"a": 1})
    path = tmp_path / "deep" / "curvature.safetensors"
    curvature.save(path)
    loaded = kind.load(path)
    assert type(loaded) is kind
    for field in dataclasses.fields(curvature):
        found, expected = getattr(loaded, field.name), getattr(curvature, field.name)
        if field.name in ("gradient", "count", "settings"):
            assert found == expected
            continue
        assert sorted(found) == sorted(expected)
        for name in expected:
            assert found[name].dtype == torch.float64
            assert torch.equal(found[name], expected[name])
    assert [p.name for p in path.parent.iterdir()] == ["curvature.safetensors"]


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_file_that_was_cut_short_is_named(net, data, tmp_path: Path, length):
    path = tmp_path / "ekfac.safetensors"
    fit(net, data)[1].save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"EKFAC file .*ekfac\.safetensors.* is damaged"):
        EKFAC.load(path)


def test_files_of_another_kind_are_refused(net, data, tmp_path: Path):
    path = tmp_path / "other.safetensors"
    fit(net, data)[1].save(path)
    with pytest.raises(ValueError, match=r"KFAC file .* of another kind .*EKFAC"):
        KFAC.load(path)
    DiagonalFisher({"w": torch.ones(1).double()}, 1).save(path)
    with pytest.raises(ValueError, match=r"EKFAC file .* of another kind"):
        EKFAC.load(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"EKFAC file .* of another kind"):
        EKFAC.load(path)
    with pytest.raises(ValueError, match=r"nothing\.safetensors': no such file"):
        EKFAC.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("name", "kind"), [("mix.bias", "bias of a Linear"), ("norm.weight", "weight of a LayerNorm")]
)
def test_other_parameters_are_sent_to_the_diagonal(net, data, name, kind):
    chosen = {"keys.weight": net.keys.weight, name: net.get_parameter(name)}
    with pytest.raises(ValueError, match=f"{name} is the {kind}, .* diagonal Fisher"):
        kronecker_covariances(net, chosen, losses(net, data, 2))


def test_a_layer_that_does_nothing_is_named(net, data):
    net.unused = nn.Linear(3, 2).double()
    with pytest.raises(ValueError, match=r"no loss depends on .*unused\.weight"):
        kronecker_covariances(net, {"unused.weight": net.unused.weight}, losses(net, data, 2))


def test_weights_that_hooks_do_not_see_are_refused():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(inplace=True), nn.Linear(3, 3))
    loss = lambda: net(torch.ones(2, 3)).sum(1)  # noqa: E731
    with pytest.raises(ValueError, match=r"changed in place.* 0\.weight"):
        kronecker_covariances(net, {"0.weight": net[0].weight}, [loss])
    net[2].weight = net[0].weight
    with pytest.raises(ValueError, match=r"0\.weight .* shares it with no other"):
        kronecker_covariances(net, {"0.weight": net[0].weight}, [loss])


def test_nothing_to_fit_on_is_an_error(net, chosen, data):
    with pytest.raises(ValueError, match="no example"):
        kronecker_covariances(net, chosen, [])
    with pytest.raises(ValueError, match="no gradient"):
        EKFAC.fit(fit(net, data)[0], [])


def test_what_is_not_finite_is_named(net, chosen, data):
    covariances, _ = fit(net, data)
    rows = {n: torch.full((1, *p.shape), torch.nan) for n, p in chosen.items()}
    with pytest.raises(ValueError, match=r"squared gradient of keys\.weight is not finite"):
        EKFAC.fit(covariances, [rows])
    data[1][2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"covariance of keys\.weight is not finite"):
        kronecker_covariances(net, chosen, losses(net, data, 2))


def test_centring_what_cannot_be_centred_is_refused(net, chosen, data):
    with pytest.raises(ValueError, match="centre_inputs has 'k'"):
        kronecker_covariances(net, chosen, losses(net, data, 2), centre_inputs=["k"])
    text, noise = data
    one_token = losses(net, (text[:, :1], noise[:, :, :1]), 2)
    with pytest.raises(ValueError, match=r"keys\.weight sees one token"):
        kronecker_covariances(net, chosen, one_token, centre_inputs=["keys.weight"])


def test_unequal_numbers_of_gradients_are_refused(net, chosen, data):
    rows = {n: torch.ones(2, *p.shape) for n, p in chosen.items()}
    more = {"mix.weight": rows["mix.weight"]}
    with pytest.raises(ValueError, match=r"2 gradients of keys\.weight, but 4 of mix\.weight"):
        EKFAC.fit(fit(net, data)[0], [rows, more])


def test_another_selection_or_model_is_refused(net, data):
    _, curvature = fit(net, data)
    with pytest.raises(ValueError, match="EKFAC: fitted without v"):
        curvature.precondition({"v": torch.ones(3, 3)})
    for shape in (3, 6), (18,), (1, 2, 6, 3):
        with pytest.raises(ValueError, match=r"keys\.weight is \(6, 3\) in the curvature, but"):
            curvature.rotate({"keys.weight": torch.ones(shape)})
    for damping in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"damping = {damping} must not be negative"):
            curvature.precondition({"keys.weight": torch.ones(6, 3)}, damping)


def test_a_parameter_without_any_curvature_stays():
    covariances = KroneckerCovariances(
        {"w": torch.zeros(2, 2).double()}, {"w": torch.zeros(3, 3).double()}, {"w": 1.0},
        "averaged", 1,
    )  # fmt: skip
    step = KFAC.fit(covariances).precondition({"w": torch.ones(3, 2).double()})["w"]
    assert not step.any()


def test_kronfluence_agrees(tmp_path: Path):
    """Covariances, eigenvectors and Λ of an independent implementation."""
    kronfluence = pytest.importorskip("kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model

    class Task(kronfluence.Task):
        def compute_train_loss(self, batch, model, sample=False):
            return model(batch[0]).square().mean((1, 2)).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)
    ).double()
    x = torch.randn(EXAMPLES, TOKENS, 3).double()
    chosen = dict(net.named_parameters())

    def loss() -> Tensor:
        return net(x).square().mean((1, 2))

    covariances = kronecker_covariances(net, chosen, [loss])
    ekfac = EKFAC.fit(covariances, [per_example_gradients(net, chosen, loss)])

    arguments = kronfluence.FactorArguments(
        use_empirical_fisher=True,
        activation_covariance_dtype=torch.float64,
        gradient_covariance_dtype=torch.float64,
        per_sample_gradient_dtype=torch.float64,
        lambda_dtype=torch.float64,
    )
    copied = prepare_model(copy.deepcopy(net), Task())
    analyzer = Analyzer(
        "net", copied, Task(), cpu=True, output_dir=str(tmp_path), disable_tqdm=True
    )
    analyzer.fit_all_factors(
        "all", TensorDataset(x), per_device_batch_size=2, factor_args=arguments
    )
    theirs = {**analyzer.load_covariance_matrices("all"), **analyzer.load_lambda_matrices("all"),
              **analyzer.load_eigendecomposition("all")}  # fmt: skip
    for name in chosen:
        layer = name.removesuffix(".weight")
        assert_close(
            theirs["activation_covariance"][layer]
            / theirs["num_activation_covariance_processed"][layer],
            covariances.inputs[name],
        )
        assert_close(
            theirs["gradient_covariance"][layer]
            / theirs["num_gradient_covariance_processed"][layer],
            covariances.outputs[name],
        )
        for found, key in (
            (ekfac.input_vectors[name], "activation_eigenvectors"),
            (ekfac.output_vectors[name], "gradient_eigenvectors"),
        ):
            same = (found.T @ theirs[key][layer]).abs()
            torch.testing.assert_close(same, torch.eye(len(same)).double(), rtol=0, atol=1e-8)
        found = theirs["lambda_matrix"][layer] / theirs["num_lambda_processed"][layer]
        torch.testing.assert_close(found, ekfac.values[name], rtol=1e-8, atol=0)


@pytest.mark.skipif(not torch.mps.is_available(), reason="needs Apple's mps, which has no float64")
def test_a_device_without_float64_gives_the_step_of_the_cpu(net, data):
    def step(device: str) -> dict[str, Tensor]:
        network = copy.deepcopy(net).float().to(device)
        parameters = {name: network.get_parameter(name) for name in NAMES}
        batches = losses(network, tuple(x.float().to(device) for x in data), EXAMPLES)
        covariances = kronecker_covariances(network, parameters, batches)
        examples = [per_example_gradients(network, parameters, batch) for batch in batches]
        return EKFAC.fit(covariances, examples).precondition(examples[0])

    found, expected = step("mps"), step("cpu")
    for name in NAMES:
        # float32 on both sides, summed in another order
        torch.testing.assert_close(found[name].cpu(), expected[name], rtol=1e-3, atol=1e-4)
