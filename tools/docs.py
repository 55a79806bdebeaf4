"""README.md and the site from the notebooks, on machines without quarto.

`python -m tools.docs readme` writes README.md from nbs/index.ipynb, `python -m tools.docs site` writes _docs/."""
import ast, nbformat, re, shutil, sys
from pathlib import Path
from nbconvert import MarkdownExporter
from fastcore.basics import AttrDict
from fastcore.nbio import mk_cell, nb2str, read_nb, write_nb
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parent.parent
NBS,PAGES,SITE = ROOT/'nbs', ROOT/'_proc', ROOT/'_docs'

# ---- Pages: notebooks as readers see them. nbdev adds what `show_doc` prints and links to names, but writes for quarto

_re_export    = re.compile(r'^#\|\s*export\s*\n')
_re_style     = re.compile(r'<style>.*?</style>', re.DOTALL)
_re_directive = re.compile(r'^#\|\s*([\w-]+):?\s*(.*)\n?', re.MULTILINE)
_re_attrs     = re.compile(r'(\]\([^)]*\))\{[^}]*\}')
_re_source    = re.compile(r'^\[source\]\(.*\n+', re.MULTILINE)
_re_link      = re.compile(r'(?<=\]\()([^)\s#]+)')
_re_object    = re.compile(r'__main__\.|<function (\w+) at 0x\w+>') # how Python prints what a notebook defines
_re_within    = re.compile(r'\[([^][]*)\[(`[^`]+`)\]\([^)]*\)([^][]*)\](?=\()')

def page_names():
    "The name of each notebook's page, in reading order"
    return {path: nbpath2html(path).stem for path in nbglob(NBS, as_path=True).sorted()}

def heading(nb):
    "The heading that nbdev made front matter of"
    about = nb.frontmatter_
    return mk_cell(f'# {about["title"]}' + (f'\n\n> {about["description"]}' if 'description' in about else ''), 'markdown')

def documentation(cell):
    "The markdown that a `show_doc` printed, as a cell: its headings become headings of the page"
    md = _re_object.sub(r'\1', cell.outputs[0].data['text/markdown'].removeprefix('---\n\n'))
    return mk_cell(md if get_config().git_url else _re_source.sub('', md), 'markdown')

def with_sources(cells):
    "`cells`, and after each that is exported its code, folded: nbdev shows public names alone, and the page speaks of the others, too"
    for cell in cells:
        yield cell
        source = _re_export.sub('', cell.source)
        if cell.cell_type != 'code' or source == cell.source: continue
        if all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(source).body): continue
        yield mk_cell(f'#| code-fold: true\n#| eval: false\n{source}', metadata=AttrDict())

def is_shown(output):
    "Whether `output` shows anything without the style sheet that progress bars print"
    if 'text/html' not in output.get('data', {}): return True
    output.data['text/html'] = _re_style.sub('', output.data['text/html'])
    return bool(output.data['text/html'].strip())

def clean(cell):
    "A code `cell` with its directives turned into what Sphinx and nbconvert know: a tag, a text for its image"
    directives = dict(_re_directive.findall(cell.source))
    cell.source = _re_directive.sub('', cell.source)
    cell.metadata = dict(tags=['remove-input']) if directives.get('echo') == 'false' else {}
    if directives.get('code-fold') == 'true': cell.metadata = dict(tags=['hide-input'])
    if 'fig-alt' in directives: cell.metadata['mystnb'] = dict(image=dict(alt=directives['fig-alt'].strip('"')))
    cell.outputs = [o for o in cell.outputs if is_shown(o)]
    return cell

def relink(cell, links):
    "A markdown `cell` with its `links` replaced, without attributes that only quarto knows, and without links that nbdev made within links"
    source = _re_within.sub(r'[\1\2\3]', _re_attrs.sub(r'\1', cell.source))
    cell.source = _re_link.sub(lambda m: links.get(m[1], m[1]), source)
    return cell

def with_markdown(cell):
    "A code `cell`, and after it the markdown that it shows, as a cell whose links are replaced like those of others"
    shown = [o for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {}) and 'text/html' not in o.data]
    if shown: cell.outputs = [o for o in cell.outputs if o not in shown]
    return [cell, *(mk_cell(''.join(o.data['text/markdown']), 'markdown') for o in shown)]

def page(path, links):
    "The notebook at `path` as Sphinx and nbconvert read it"
    nb = read_nb(path)
    nb.cells = [*with_sources(nb.cells)]
    FilterDefaults()(nb)
    nb.cells[0] = heading(nb)
    cells = [documentation(c) if 'show_doc(' in c.source else c for c in nb.cells]
    cells = [o for c in cells for o in with_markdown(c)]
    nb.cells = [clean(c) if c.cell_type == 'code' else relink(c, links) for c in cells]
    nb.metadata['language_info'] = dict(name='python')
    return nb

def page_links(target):
    "What links to a notebook, by its file or by the address that nbdev gives its page, become: `target(path, name)`"
    base = get_config().doc_host + get_config().doc_baseurl
    return {link: target(path, name) for path,name in page_names().items() for link in (path.name, f'{base}{name}.html')}

# ---- The README: the page of the index, with links that work beside the notebooks

_re_image  = re.compile(r'!\[\w+\](\(nbs/images/readme_(\d+)_\d+\.\w+\))')
_re_blanks = re.compile(r'\n{3,}')
_re_anchor = re.compile(r'(\(nbs/[\w.]+\.ipynb)#[^)\s]+')

def readme():
    "The files that the index notebook makes: README.md and the pictures in its outputs, bytes by path"
    links = page_links(lambda path, name: f'nbs/{path.name}')
    links |= {f'images/{path.name}': f'nbs/images/{path.name}' for path in NBS.glob('images/*')}
    nb = nbformat.reads(nb2str(page(NBS/'index.ipynb', links)), as_version=4)
    exporter = MarkdownExporter(config=dict(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=['remove-input'])))
    text,made = exporter.from_notebook_node(nb, dict(output_files_dir='nbs/images', unique_key='readme'))
    def described(m): return f'![{nb.cells[int(m[2])].metadata.mystnb.image.alt}]{m[1]}'
    text = _re_anchor.sub(r'\1', _re_image.sub(described, text)) # notebooks are shown in frames that anchors do not reach
    text = '\n'.join(line.rstrip() for line in text.strip().splitlines()) + '\n'
    return {'README.md': _re_blanks.sub('\n\n', text).encode(), **made['outputs']}

def write_readme():
    "Write README.md and its pictures, without those of an earlier one"
    for old in NBS.glob('images/readme_*'): old.unlink()
    for name,content in readme().items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(content)

# ---- The site: all pages, by Sphinx

def slug(text):
    "The anchor of a heading, as nbdev links to it: `KnowledgeDistillationCallback.before_fit` keeps its dot"
    return re.sub(r'[^\w.-]', '', text.lower().replace(' ', '-'))

def contents(names):
    "A table of contents: guides and tutorials before the modules"
    guides, tutorials = ([name for name in names if name.startswith(kind)] for kind in ('guide.', 'tutorial.'))
    groups = dict(Guides=guides, Tutorials=tutorials, Modules=[name for name in names if name not in ('index', *guides, *tutorials)])
    def tree(caption, names): return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *names, '```'])
    return mk_cell('\n\n'.join(tree(caption, names) for caption,names in groups.items() if names), 'markdown')

def write_pages():
    "Write all pages to a folder for Sphinx"
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir()
    links = page_links(lambda path, name: f'{name}.ipynb')
    for path,name in page_names().items():
        nb = page(path, links)
        if name == 'index': nb.cells.append(contents(page_names().values()))
        write_nb(nb, PAGES/f'{name}.ipynb')
    if (NBS/'images').exists(): shutil.copytree(NBS/'images', PAGES/'images')

def visit_math(translator, node):
    "Write a formula as MathML, which browsers show without a script; what cannot be written is an error"
    from docutils import nodes
    from latex2mathml.converter import convert
    mathml = convert(node.astext(), display='block' if isinstance(node, nodes.math_block) else 'inline')
    if unknown := re.search(r'<mi>(\\\w+)', mathml): raise ValueError(f'{unknown[1]} is not known, in {node.astext()}')
    translator.body.append(mathml)
    raise nodes.SkipNode

def setup(app):
    "What makes this module an extension of Sphinx"
    app.add_html_math_renderer('mathml', inline_renderers=(visit_math, None), block_renderers=(visit_math, None))
    return dict(parallel_read_safe=True)

def write_site():
    "Build the site; a broken link or formula is an error"
    from sphinx.application import Sphinx
    write_pages()
    conf = dict(project='fastkd', html_title=f'fastkd {get_config().version}', html_theme='furo', html_show_copyright=False,
        html_copy_source=False, html_math_renderer='mathml', extensions=['myst_nb', 'tools.docs'], nb_execution_mode='off',
        nb_code_prompt_show='source', nb_code_prompt_hide='source')
    conf |= dict(html_static_path=[str(NBS/'styles.css')], html_css_files=['styles.css'], myst_enable_extensions=['dollarmath', 'amsmath'],
        myst_dmath_double_inline=True, myst_heading_anchors=4, myst_heading_slug_func='tools.docs.slug')
    # built among the pages and moved when it is whole, since myst-nb leaves a folder beside what it builds
    app = Sphinx(PAGES, None, PAGES/'html', PAGES/'.doctrees', 'html', conf, status=None, warningiserror=True)
    app.build()
    if app.statuscode: sys.exit(app.statuscode)
    shutil.rmtree(SITE, ignore_errors=True)
    (PAGES/'html').rename(SITE)
    print(f'The site is in {(SITE/"index.html").relative_to(ROOT)}')

if __name__ == '__main__': dict(readme=write_readme, site=write_site)[sys.argv[1]]()
