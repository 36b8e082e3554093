"""The paper's tables and figures beside our model's, then what the press claims beside what the model says.

Every row says whether it is model, simulated or measured; the paper's Table 6 is model output as well. One
curve is fitted: prefill on H20, which the paper does not print (router/core/profiles/case_study.py).
"""

from __future__ import annotations

from benchmarks.harness import run
from benchmarks.paper import claims, simulated, tables

if __name__ == "__main__":
    run(
        "paper",
        {
            "table3": tables.tables_3,
            "egress": tables.egress,
            "table5": tables.tables_5,
            "table6": tables.tables_6,
            "simulated": simulated.tables_6,
            "figure5": tables.figures_5,
            "cost": tables.costs,
            "bandwidth": tables.bandwidth,
            "claims": claims.claims,
        },
        __doc__ or "",
    )
