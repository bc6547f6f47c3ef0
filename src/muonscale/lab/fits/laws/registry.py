"""The laws that a table can be fitted to. A new law is a module and a row here."""

from __future__ import annotations

from muonscale.lab.fits.laws.base import Law
from muonscale.lab.fits.laws.batch import BatchLaw
from muonscale.lab.fits.laws.chinchilla import ChinchillaLaw
from muonscale.lab.fits.laws.power import PowerLaw
from muonscale.lab.fits.laws.power_offset import OffsetPowerLaw
from muonscale.lab.fits.laws.regimes import RegimeLaw

LAWS: dict[str, type[Law]] = {
    law.NAME: law for law in (ChinchillaLaw, PowerLaw, OffsetPowerLaw, BatchLaw, RegimeLaw)
}
"""By the name that `--law` takes. `auto` takes the first law for which a table has the columns."""
