"""FastDeploy's module names, for launch lines: `python -m fastdeploy.entrypoints.openai.api_server ...` runs ernest.

Nothing of FastDeploy itself is here.
"""
