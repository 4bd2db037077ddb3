"""What Flower starts on the coordinator's side of a run: the conductor of the launch that ``run_config`` names."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from medlsdm_server.conductor import Conductor
from medlsdm_server.home import ServerHome
from medlsdm_server.launch import read_launch

__all__ = ["Conductor", "app", "main"]
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the launch."""
    home = ServerHome.default(None)
    Conductor(home, read_launch(home, str(context.run_config["launch"])), grid).run()
