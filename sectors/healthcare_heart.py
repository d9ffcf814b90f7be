"""Heart disease in four real hospitals that measured different things.

UCI Heart Disease (CC BY 4.0): 920 patients of Cleveland, Budapest (Hungarian), Zurich and Basel (Switzerland) and Long
Beach (VA); 13 attributes, and `num` 0 to 4, of which `target` is num > 0.  Prevalence runs from 36 to 94 %, and what is
missing differs by site: Switzerland has no cholesterol, three hospitals hardly any fluoroscopy (`ca`) or `thal`.  The
files write 0 where cholesterol or blood pressure was not measured.  Codes and units are those of the data set's own
description.  Detrano et al., 1989, https://doi.org/10.1016/0002-9149(89)90524-9
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sectors.schema import Column
from sectors.tabular import Tabular


@dataclass(frozen=True)
class HealthcareHeart(Tabular):
    """Diseased or not; a node is a hospital."""

    name: ClassVar[str] = "healthcare_heart"
    title: ClassVar[str] = "Heart disease: which patients have it (UCI, four hospitals)"
    data_files: ClassVar[tuple[str, ...]] = ("healthcare/heart_disease_4sites.csv",)
    source: ClassVar[str] = "archive.ics.uci.edu/dataset/45 (the four processed files, with a column site)"

    site: ClassVar[str | None] = "site"
    sites: ClassVar[tuple[str, ...]] = ("cleveland", "hungarian", "switzerland", "va")
    target: ClassVar[str] = "target"
    inputs: ClassVar[tuple[Column, ...]] = (
        Column("age", "years", low=0, high=120),
        Column("sex", categories=(0, 1)),
        Column("cp", categories=(1, 2, 3, 4)),
        Column("trestbps", "mm Hg", low=50, high=300, missing=(0,), optional=True),
        Column("chol", "mg/dl", low=50, high=700, missing=(0,), optional=True),
        Column("fbs", categories=(0, 1), optional=True),
        Column("restecg", categories=(0, 1, 2), optional=True),
        Column("thalach", "beats a minute", low=40, high=250, optional=True),
        Column("exang", categories=(0, 1), optional=True),
        Column("oldpeak", "mm", low=-5, high=10, optional=True),
        Column("slope", categories=(1, 2, 3), optional=True),
        Column("ca", "vessels", low=0, high=4, optional=True),
        Column("thal", categories=(3, 6, 7), missing=(0,), optional=True),
    )

    hidden: tuple[int, ...] = (8,)
    synthetic_rows: int = 920
