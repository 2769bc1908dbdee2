"""The flows. flows.environment sets Prefect's variables, which Prefect reads when it is imported."""

import flows.environment  # noqa: F401
