from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser()
cfg.read('settings.ini', encoding='utf-8')
facts,extra = dict(cfg['DEFAULT']),'_requirements'

setup(
    **{k: facts[k] for k in ('description', 'keywords', 'author', 'license')},
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=[f'Development Status :: {facts["status"]}', f'Intended Audience :: {facts["audience"]}',
        'Programming Language :: Python :: 3', 'Programming Language :: Python :: 3 :: Only'],
    install_requires=facts['requirements'].split(),
    extras_require={k.removesuffix(extra): v.split() for k,v in facts.items() if k.endswith(extra)})
