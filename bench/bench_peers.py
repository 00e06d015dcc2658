"""Other libraries' LoRA tax on an H100, as lines to compare with; they are not run here.

Measured with torch 2.11 and triton 3.6, bf16, forward + backward by graph replay, in interleaved rounds against the
frozen linear, but over one W, x and dy, which at M = 512 may lie in the L2. Unsloth and axolotl: their functions of one
projection. NeMo Automodel. LoRAFusion: ported to that triton, its backward without dropout mended.
"""

NAMES = ("Unsloth", "axolotl", "NeMo Automodel", "LoRAFusion")
MEASURED_ON = "H100"
TAX = {
    (8192, 4096, 4096, 16): (1.424, 1.387, 1.441, 1.216),
    (8192, 4096, 4096, 64): (1.412, 1.375, 1.460, 1.696),
    (8192, 4096, 14336, 16): (1.237, 1.206, 1.240, 1.110),
    (8192, 14336, 4096, 16): (1.242, 1.234, 1.266, 1.120),
    (2048, 4096, 4096, 16): (1.476, 1.412, 1.696, 1.284),
    (512, 4096, 4096, 16): (1.859, 1.721, 2.567, 2.168),
}
