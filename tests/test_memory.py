"""What launches share: words, workspaces; and rows as a descriptor reads them."""

import torch

from fusedlora.memory import row_major


def test_a_single_row_may_have_any_stride() -> None:
    for tensor in (
        torch.randn(16, 1).t(),
        torch.randn(1, 16).as_strided((1, 16), (0, 1)),
        torch.randn(3, 40)[1:2, :16],
    ):
        seen = row_major(tensor)
        assert torch.equal(seen, tensor) and seen.data_ptr() == tensor.data_ptr()
        assert seen.stride(1) == 1 and seen.stride(0) >= 16 and seen.stride(0) % 4 == 0
