"""Check what pip cannot bring: a system library with which MuJoCo draws without a screen."""

from jobs.errors import speaking


def main() -> None:
    """End with one line and status 2 if nothing can be drawn."""
    with speaking(debug=False):
        from dreamgen.sims.renderer import Renderer, mujoco

        Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()


if __name__ == "__main__":
    main()
