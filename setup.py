"Hands settings.ini, the single place for metadata and dependencies, to setuptools."
from configparser import ConfigParser
from setuptools import setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
s = config['DEFAULT']

setup(
    version=s['version'],
    description=s['description'],
    python_requires=f">={s['min_python']}",
    install_requires=s['requirements'].split(),
    extras_require={
        'dev': s['dev_requirements'].split(),
        'bm3d': s['bm3d_requirements'].split(),  # free for non-commercial use only
        'public': s['public_requirements'].split(),  # networks of public checkpoints, for lesson 22
        'cluster': s['cluster_requirements'].split(),  # a Dask cluster for the rows of lesson 18
    },
    entry_points={'console_scripts': s['console_scripts'].split()},
)
