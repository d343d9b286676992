"""How far results may be from what is expected, and why: every bound of the tests on rounding.

Errors are absolute where numbers are about 1 in size, else relative. A bound that is itself the
claim of a test (an error 0.9 times another, a share of bytes, a statistic) stands in that test.
"""

import torch

# ---- exact, but for rounding --------------------------------------------------------------------

# The same formula twice in float64: it rounds by 1e-16, and sums have at most some thousand terms.
FLOAT64 = 1e-12
# One or a few operations on float32 numbers, which round by 6e-8: rotations, ranks, shares of 1.
FLOAT32 = 1e-6
# Sums of float32 numbers in another order: over dims of a head, tokens of a page, weights of 1.
SUMS = 1e-5
# Attention in float32 beside float64: a score of size s is wrong by 1e-7 s, and weights by as much.
ATTENTION = 2e-5
# Its log-sum-exp, relative; and partial attentions merged in float32 in two ways.
LSE = 2e-6
# The same with weights given out, of scores up to 50, in 16 bits too: scores must not be rounded
# to these, which would make 1e-1.
WIDE_SCORES = 2e-4

# ---- by dtype -----------------------------------------------------------------------------------

# Results rounded to the dtype, relative to the largest: a number by 2^-9 in bfloat16 and 2^-12 in
# float16, several one after the other.
ROUNDED = {
    torch.float64: FLOAT64,
    torch.float32: SUMS,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
# Attention over codes beside float64 over the decoded pages: these are rounded to the dtype, too.
OVER_CODES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 3e-2}
# Keys that were turned hundreds of times, with what 16 bits leave of each turn kept beside them.
DRIFT = {torch.float32: 1e-4, torch.bfloat16: 6e-3, torch.float16: 1e-3}
# Norms of projections, relative: products in bfloat16 are rounded to 2^-9, and a norm sums 32.
NORMS = {torch.float32: SUMS, torch.bfloat16: 2**-9}

# ---- whole models -------------------------------------------------------------------------------

# Float32 models whose logits are about 1: a lossless cache beside DynamicCache adds up attention in
# another order, which a few layers make 1e-5 at most; one wrong token changes 1e-3 and more.
LOGITS = 1e-4
# What one layer of a float32 model makes of states that were computed in two ways, relative.
STATES = 1e-4
# Keys of any architecture when all tokens are later, relative: rounding of every layer before.
SHIFTED = 3e-5
# What a test calls a change at all is above this, well above what `LOGITS` lets pass.
VISIBLE = 1e-3

# ---- codes and what is fitted -------------------------------------------------------------------

# Moments and singular values of float32 states of a text, relative.
FITTED = 1e-4
# Sums of products over a text that cancel: absolute, of terms that add up to hundreds.
MOMENTS = 1e-3
# A share of pages encoded in other blocks: rounding changes now and then which code is nearest.
NEAREST_CODE = 3e-3
# The error of a compressor, relative: a difference of outputs that is 1e-3 of them, in float32.
PROBE = 2e-3
# Effects of changes by 1e-5 beside their first order, relative.
FIRST_ORDER = 1e-3
# Half a step of eight bits, for weights up to 24^-0.5 in size.
EIGHT_BITS = 1e-3
# Two factors of numbers at the end of the range of float16, each rounded to it.
FACTORS_AT_THE_END = 4e-3
# The norm of a token of codes: its level, and its length, are rounded to bfloat16.
NORM_OF_CODES = 1e-2
# Levels of a codebook that were published with three and four digits.
PUBLISHED = 1e-3
