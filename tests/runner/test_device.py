import pytest
import torch

from timm_mamba_pkd.runner.device import slows_down

CPU = torch.device("cpu")
NONE = dict.fromkeys(("avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16"), False)


@pytest.mark.parametrize(
    ("amp", "device", "has", "slow"),
    [
        (torch.bfloat16, "cpu", {}, True),
        (torch.bfloat16, "cpu", {"amx_fp16": True, "avx512_fp16": True}, True),
        (torch.bfloat16, "cpu", {"avx512_bf16": True}, False),
        (torch.bfloat16, "cpu", {"amx_bf16": True}, False),
        (torch.float16, "cpu", {"amx_bf16": True}, True),
        (torch.float16, "cpu", {"avx512_fp16": True}, False),
        (torch.bfloat16, "cpu", {"architecture": "aarch64"}, False),
        (torch.bfloat16, "cuda", {}, False),
        (None, "cpu", {}, False),
    ],
)
def test_a_cpu_without_instructions_for_it_is_slower_with_amp(monkeypatch, amp, device, has, slow):
    capabilities = {"architecture": "x86_64", **NONE, **has}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert slows_down(amp, torch.device(device)) == slow


def test_an_older_pytorch_does_not_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not slows_down(torch.bfloat16, CPU)
