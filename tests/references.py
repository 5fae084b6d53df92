"""The equations of the papers as plain float64 loops. This file imports nothing of ours and knows no shortcut.

Tokens are numbered in raster order, i = h * W + w. A gate is a list of L floats G_i <= 0, one head, patch tokens only.
A mask is a list of L lists of L floats.
"""

import cmath
import math
import operator


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -30 else x - math.log1p(math.exp(x))


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def gate(x, weight):
    """Eq. 4-5 for one head: x is L lists of D floats, weight D floats -> L floats."""
    return [log_sigmoid(sum(a * b for a, b in zip(token, weight, strict=True))) for token in x]


def manhattan(i, j, width):
    """Eq. 7."""
    return abs(i // width - j // width) + abs(i % width - j % width)


def full(gate, height, width, alpha=0.1):
    """Eq. 8-9."""
    length = height * width
    return [
        [-abs(0.5 * (gate[i] + gate[j]) * manhattan(i, j, width) * alpha) for j in range(length)] for i in range(length)
    ]


def squared(gate, height, width, alpha=0.01):
    """The mean of two gates, times the Euclidean distance squared, times alpha."""
    length = height * width
    return [
        [
            0.5 * (gate[i] + gate[j]) * alpha * ((i // width - j // width) ** 2 + (i % width - j % width) ** 2)
            for j in range(length)
        ]
        for i in range(length)
    ]


def fixed_rate(head, num_heads, initial_value, heads_range):
    """RMT's lambda_n."""
    return math.log(1 - 2 ** (-initial_value - heads_range * head / num_heads))


def fixed(rate, height, width):
    """RMT's decay with the Manhattan distance."""
    length = height * width
    return [[-abs(rate) * manhattan(i, j, width) for j in range(length)] for i in range(length)]


def euclidean(i, j, width):
    """The length of the straight line."""
    return math.hypot(i // width - j // width, i % width - j % width)


def alibi_slopes(num_heads):
    """ALiBi's rule for any number of heads: for a power of two a geometric series down to 2 ** -8."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    return slopes + (alibi_slopes(2 * power)[::2][: num_heads - power] if num_heads > power else [])


def alibi(slope, height, width):
    """ALiBi in two dimensions, as CROMA has it."""
    length = height * width
    return [[-slope * euclidean(i, j, width) for j in range(length)] for i in range(length)]


def path(gate, causal=False):
    """Eq. 6, extended to both sides; causal: Eq. 6 itself, nothing above the diagonal."""
    length = len(gate)
    mask = [[0.0] * length for _ in range(length)]
    for i in range(length):
        for j in range(length):
            mask[i][j] = -sum(abs(gate[k]) for k in range(min(i, j), max(i, j)))
            if causal and j > i:
                mask[i][j] = -math.inf
    return mask


def path_backward(gate):
    """The backward scan: k = min + 1 .. max."""
    length = len(gate)
    return [
        [-sum(abs(gate[k]) for k in range(min(i, j) + 1, max(i, j) + 1)) for j in range(length)] for i in range(length)
    ]


def bidirectional(gate_forward, gate_backward):
    """Table 4: the mean of the two scans."""
    return mean_of(path(gate_forward), path_backward(gate_backward))


def mean_of(a, b):
    return [[(x + y) / 2 for x, y in zip(row_a, row_b, strict=True)] for row_a, row_b in zip(a, b, strict=True)]


def decomposed(gate_h, gate_w, height, width):
    """Eq. 11: the masks of each column (W of them, H x H) and of each row (H of them, W x W)."""
    columns = [path([gate_h[h * width + w] for h in range(height)]) for w in range(width)]
    rows = [path([gate_w[h * width + w] for w in range(width)]) for h in range(height)]
    return columns, rows


def fixed_decomposed(rate, height, width):
    """RMT's first stages: the same two sets of masks."""
    column = [[-abs(rate) * abs(i - j) for j in range(height)] for i in range(height)]
    row = [[-abs(rate) * abs(i - j) for j in range(width)] for i in range(width)]
    return [column] * width, [row] * height


def gaussian(amplitude, variance_h, variance_w, height, width):
    """LocAtViT's addition to the scores: a Gaussian around each query."""
    length = height * width
    return [
        [
            amplitude[i]
            * math.exp(
                -0.5 * (i // width - j // width) ** 2 / variance_h[i]
                - 0.5 * (i % width - j % width) ** 2 / variance_w[i]
            )
            for j in range(length)
        ]
        for i in range(length)
    ]


def with_prefix(mask, num_prefix):
    """Prefix tokens come first, and nothing is added to any score that they take part in."""
    length = len(mask) + num_prefix
    return [
        [mask[i - num_prefix][j - num_prefix] if min(i, j) >= num_prefix else 0.0 for j in range(length)]
        for i in range(length)
    ]


def added_value(value, limit, lowest):
    """What one value of an attn_mask adds: -inf, "may not attend", where it is at most limit or half of lowest."""
    return -math.inf if value <= limit or value <= lowest / 2 else value


def softmax(scores):
    """A row of scores -> weights; a row that may attend to nothing -> zeros."""
    highest = max(scores)
    if highest == -math.inf:
        return [0.0] * len(scores)
    weights = [math.exp(s - highest) for s in scores]
    total = sum(weights)
    return [w / total for w in weights]


def attention(q, k, v, mask, scale):
    """Eq. 10 for one head: L lists of d floats each -> L lists of d floats."""
    out, channels = [], list(zip(*v, strict=True))
    for i, query in enumerate(q):
        weights = softmax([scale * inner(query, key) + mask[i][j] for j, key in enumerate(k)])
        out.append([inner(weights, channel) for channel in channels])
    return out


def inner(a, b):
    """Sum of a[n] * b[n]; most of the time of the random calls is here, and in map less of it."""
    return sum(map(operator.mul, a, b))


def axial_attention(q, k, v, columns, rows, height, width, scale, extra=None):
    """Eq. 12 for one head: within each row, then within each column of the result; extra[i][j] is an attn_mask."""
    length = height * width
    extra = extra or [[0.0] * length for _ in range(length)]
    lines = [([h * width + w for w in range(width)], rows[h]) for h in range(height)]
    after_rows = _along(lines, q, k, v, extra, scale)
    lines = [([h * width + w for h in range(height)], columns[w]) for w in range(width)]
    return _along(lines, q, k, after_rows, extra, scale)


def _along(lines, q, k, v, extra, scale):
    out = [None] * len(q)
    for tokens, decay in lines:
        mask = [[decay[a][b] + extra[tokens[a]][tokens[b]] for b in range(len(tokens))] for a in range(len(tokens))]
        line = attention([q[i] for i in tokens], [k[i] for i in tokens], [v[i] for i in tokens], mask, scale)
        for i, result in zip(tokens, line, strict=True):
            out[i] = result
    return out


def frequencies(count):
    """RMT's spacing: 10000 ** -linspace(0, 1, count)."""
    return [10000.0 ** (-(m / (count - 1) if count > 1 else 0.0)) for m in range(count)]


def rotate(x, h, w, width, mode):
    """One token's head, d floats, at row h and column w: pairs of channels as complex numbers that are turned."""
    pairs = [complex(x[2 * m], x[2 * m + 1]) for m in range(len(x) // 2)]
    if mode == "axial":
        half = len(pairs) // 2
        angles = [h * f for f in frequencies(half)] + [w * f for f in frequencies(half)]
    else:
        angles = [(h * width + w) * f for f in frequencies(len(pairs))]
    turned = [z * cmath.exp(1j * angle) for z, angle in zip(pairs, angles, strict=True)]
    return [part for z in turned for part in (z.real, z.imag)]


def depthwise(channel, kernel, bias, height, width):
    """One channel of a depthwise convolution (cross-correlation, zero padding): H*W floats -> H*W floats."""
    size = len(kernel)
    out = []
    for h in range(height):
        for w in range(width):
            total = bias
            for a in range(size):
                for b in range(size):
                    y, x = h + a - size // 2, w + b - size // 2
                    if 0 <= y < height and 0 <= x < width:
                        total += kernel[a][b] * channel[y * width + x]
            out.append(total)
    return out


def output_gate(token, down, up):
    """U = sigmoid(X W_u1) W_u2 for one token; down is r rows of D, up is D rows of r."""
    hidden = [sigmoid(sum(a * b for a, b in zip(row, token, strict=True))) for row in down]
    return [sum(a * b for a, b in zip(row, hidden, strict=True)) for row in up]
