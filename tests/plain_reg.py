"""A second, plain writing of the latent transformer as functions of a state dict,
with explicit loops over heads; slow and obvious.
"""

import math

import torch


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def normed(x):
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + torch.exp(-x))


def time_embedding(state, t):
    frequencies = [math.exp(-math.log(10000) * k / 128) for k in range(128)]
    rows = [[math.cos(s * f) for f in frequencies] + [math.sin(s * f) for f in frequencies] for s in t.tolist()]
    hidden = silu(linear(state, "t_embedder.mlp.0", torch.tensor(rows, dtype=state["t_embedder.mlp.0.weight"].dtype)))
    return linear(state, "t_embedder.mlp.2", hidden)


def attention(state, name, x, heads):
    q, k, v = linear(state, f"{name}.qkv", x).chunk(3, dim=-1)
    size, out = q.shape[-1] // heads, []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        weights = torch.softmax((q[..., part] * size**-0.5) @ k[..., part].transpose(1, 2), dim=-1)
        out.append(weights @ v[..., part])
    return linear(state, f"{name}.proj", torch.cat(out, dim=-1))


def embed(state, z, patch):
    weight = state["x_embedder.proj.weight"]
    tokens = []
    for row in range(0, z.shape[2], patch):
        for column in range(0, z.shape[3], patch):
            pixels = z[:, :, row : row + patch, column : column + patch]
            tokens.append(torch.einsum("bcij,dcij->bd", pixels, weight) + state["x_embedder.proj.bias"])
    return torch.stack(tokens, dim=1)


def assemble(tokens, patch, channels):
    side = round(tokens.shape[1] ** 0.5)
    image = torch.zeros(len(tokens), channels, side * patch, side * patch, dtype=tokens.dtype)
    for index in range(tokens.shape[1]):
        for i in range(patch):
            for j in range(patch):
                for c in range(channels):
                    row, column = index // side * patch + i, index % side * patch + j
                    image[:, c, row, column] = tokens[:, index, (i * patch + j) * channels + c]
    return image


def forward(state, z, t, labels, heads, patch, outputs, class_token=None, hidden_after=0):
    """(image, class token or None, tokens after a block or None) of a state dict under the released names."""
    x = embed(state, z, patch)
    if class_token is not None:
        token = normed(linear(state, "cls_projectors2", class_token)) * state["wg_norm.weight"] + state["wg_norm.bias"]
        x = torch.cat((token[:, None], x), dim=1)
    x = x + state["pos_embed"]
    condition = time_embedding(state, t) + state["y_embedder.embedding_table.weight"][labels]
    hidden, depth = None, len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for i in range(depth):
        parts = linear(state, f"blocks.{i}.adaLN_modulation.1", silu(condition))[:, None].chunk(6, dim=-1)
        x = x + parts[2] * attention(state, f"blocks.{i}.attn", normed(x) * (1 + parts[1]) + parts[0], heads)
        mlp = gelu(linear(state, f"blocks.{i}.mlp.fc1", normed(x) * (1 + parts[4]) + parts[3]))
        x = x + parts[5] * linear(state, f"blocks.{i}.mlp.fc2", mlp)
        hidden = x if i + 1 == hidden_after else hidden
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", silu(condition))[:, None].chunk(2, dim=-1)
    x = normed(x) * (1 + scale) + shift
    token = None
    if class_token is not None:
        token, x = linear(state, "final_layer.linear_cls", x[:, 0]), x[:, 1:]
    return assemble(linear(state, "final_layer.linear", x), patch, outputs), token, hidden
