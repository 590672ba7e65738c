"""Float32 masters of bfloat16 parameters in 16 bits beside the parameter.

A bfloat16 number has the upper half of a float32's bits, so that a parameter and the difference of its master's bits,
an integer from -32768 to 32767, are the master: 4 bytes instead of 6. The one difference that would be 32768, of a
master in the middle above an even parameter, is taken for 32767: such a master is off by a float32's last digit.
"""

import torch

_MOST = 2**15 - 1


def joined(parameter: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The float32 master of a parameter.

    Args:
        parameter: Bfloat16. Whoever changes it changes the master, too.
        remainder: int16, of the same shape: what `remainder_of` returned.
    """
    bits = parameter.view(torch.int16).int()
    # A parameter that was set to zero must not make -1 of a remainder's -1, which is the bits of no number.
    harmless = torch.where(bits & _MOST == 0, remainder.clamp(min=0), remainder)
    return ((bits << 16) + harmless).view(torch.float32)


def remainder_of(parameter: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
    """What `joined` needs beside a parameter to give its master.

    Args:
        parameter: Bfloat16: the master, rounded.
        master: Float32, of the same shape.

    Returns:
        int16, of the same shape.
    """
    difference = master.view(torch.int32) - (parameter.view(torch.int16).int() << 16)
    return difference.clamp_(max=_MOST).short()
