"""The flows. Prefect reads its settings when it is imported, so what they are to be is settled before any flow is."""

import flows.environment  # noqa: F401
