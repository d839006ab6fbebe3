r"""Pictures for people: image grids, denoising strips, and where the nats of the ELBO go.

Images are written pixel by pixel, enlarged without interpolation. Charts have the size of a slide,
and colors which remain distinct to color-blind readers; lines differ in their dashes as well.
Files are written atomically, and matplotlib's global state is never touched. For figures of your
own in the same style, ``plt.style.use("pyro_vaediff.plotting.slides")``.

References:
    | Color Universal Design (Okabe & Ito, 2008)
    | https://jfly.uni-koeln.de/color/
"""

from .animation import Animation, animate
from .charts import plot_elbo_terms, plot_history, plot_kl_by_timestep, plot_log_likelihood
from .heat import draw_heat_map, draw_way_back
from .images import save_image_grid, save_panels, save_reconstructions, save_strip

__all__ = [
    "Animation",
    "animate",
    "draw_heat_map",
    "draw_way_back",
    "plot_elbo_terms",
    "plot_history",
    "plot_kl_by_timestep",
    "plot_log_likelihood",
    "save_image_grid",
    "save_panels",
    "save_reconstructions",
    "save_strip",
]
