from .commands.app import app

app(prog_name="pikv")
