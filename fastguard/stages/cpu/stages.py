"""The functions of the CPU backend, as one module that implements `backend.Stages`."""

from fastguard.stages.cpu.apply import apply as apply
from fastguard.stages.cpu.decide import decide as decide
from fastguard.stages.cpu.measure import measure_bucket as measure_bucket
from fastguard.stages.cpu.units import clip_units as clip_units
from fastguard.stages.cpu.watch import count_exponents as count_exponents
from fastguard.stages.cpu.watch import read_bits as read_bits
from fastguard.stages.reference import pack as pack
