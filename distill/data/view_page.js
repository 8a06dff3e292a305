// The page: what is asked for (kept in the address, so that a link shows the same), and what happens when it changes.

const narrow = matchMedia('(max-width: 46rem)');

const state = { query: '', least: null, most: null, sort: 'order', byQuestion: false, open: null };
for (const { key } of FACETS) state[key] = new Set();
const list = makeList(get('list'), (trace) => open(trace, { push: narrow.matches && state.open === null }));
const reader = makeReader(get('reader'), {
  onOpen: (trace) => open(trace, { reveal: true }),
  onStep: move,
  onBack: close,
});
let found = null;  // what the last search found
let searched = '';
let turn = 0;
let widest = 0;  // tokens of the longest trace
let pushed = false;  // whether opening the reader added to the browser's history

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const { key } of FACETS) state[key] = new Set(given.getAll(key));
  const [, least, most] = /^(\d*)-(\d*)$/.exec(given.get('tokens') ?? '') ?? [];
  state.least = least ? Number(least) : null;
  state.most = most ? Number(most) : null;
  state.query = given.get('q') ?? '';
  state.sort = Object.hasOwn(ORDERS, given.get('sort')) ? given.get('sort') : 'order';
  state.byQuestion = given.has('group');
  state.open = given.get('trace');
  get('search').value = state.query;
  get('sort').value = state.sort;
  get('group').checked = state.byQuestion;
}

function writeAddress(push = false) {
  const said = new URLSearchParams();
  for (const { key } of FACETS) for (const value of state[key]) said.append(key, value);
  if (state.least !== null || state.most !== null) said.set('tokens', `${state.least ?? ''}-${state.most ?? ''}`);
  if (state.query) said.set('q', state.query);
  if (state.sort !== 'order') said.set('sort', state.sort);
  if (state.byQuestion) said.set('group', '1');
  if (state.open !== null) said.set('trace', state.open);
  const address = `#${said}`;
  if (address === (location.hash || '#')) return;
  if (push) history.pushState(null, '', address);
  else history.replaceState(null, '', address);
}

/** Search if the query changed, then show what is left. `keep`: an open trace that the filters hide stays open. */
async function refresh({ keep = false } = {}) {
  turn += 1;
  const mine = turn;
  const wanted = pattern(state.query)?.source ?? '';
  if (wanted !== searched) {
    const within = found && searched && wanted.startsWith(searched) ? found : null;
    const next = wanted ? await search(state.query, within, () => mine !== turn, showProgress) : null;
    if (mine !== turn) return;
    found = next;
    searched = wanted;
  }
  const { shown, counts, bins } = select(state, found, widest);
  list.set(arrange(shown, state.sort, state.byQuestion), pattern(state.query));
  if (!keep && state.open !== null && !list.has(byUid.get(state.open))) state.open = null;
  if (!keep) list.top();
  drawFacets(counts, bins);
  drawTally(shown.length);
  writeAddress();
  read(true);
}

const showProgress = (share) => { get('tally').textContent = `searching, ${Math.round(100 * share)} %`; };

function drawTally(shown) {
  const rest = shown < traces.length ? `of ${plural(traces.length, 'trace')}` : noun(shown, 'trace');
  get('tally').replaceChildren(make('b', '', count(shown)), ` ${rest}`);
  const lengths = state.least !== null || state.most !== null;
  const chosen = FACETS.reduce((sum, { key }) => sum + state[key].size, lengths ? 1 : 0);
  get('clear').disabled = !chosen && !state.query;
  get('filters').textContent = chosen ? `Filters (${chosen})` : 'Filters';
  for (const each of document.querySelectorAll('.funnel button')) {
    each.setAttribute('aria-pressed', state[each.dataset.facet].has(each.dataset.value));
  }
}

/** Show the open trace in the reader: the one asked for, else on a wide screen the first of the list. */
function read(reveal) {
  const trace = state.open === null ? (narrow.matches ? null : list.beside(null, 0)) : byUid.get(state.open);
  document.body.classList.toggle('reading', Boolean(trace) && state.open !== null);
  list.show(trace ?? null, reveal && state.open !== null);
  if (trace) reader.show(trace, list.place(trace), pattern(state.query, 'giu'));
  else reader.say(state.open === null ? '' : `The trace ${state.open} is not on this page.`);
}

function open(trace, { push = false, reveal = false } = {}) {
  state.open = trace?.uid ?? null;
  pushed ||= push;  // so that a telephone's "back" closes the reader
  writeAddress(push);
  read(reveal);
}

function close() {
  if (pushed) history.back();  // which changes the address, and so the page
  else open(null);
  get('list').focus();
}

function move(step) {
  const now = state.open === null ? (narrow.matches ? null : list.beside(null, 0)) : byUid.get(state.open) ?? null;
  const next = list.beside(now, step);
  if (next) open(next, { reveal: true });
}

function toggle(key, value) {
  if (!state[key].delete(value)) state[key].add(value);
  refresh();
}

/** Show exactly one part of the funnel, or all of it if that part was shown. */
function onlyPart({ facet, value }) {
  const was = state[facet].has(value);
  state.status.clear();
  state.first.clear();
  if (facet === 'verdict') state.verdict.clear();
  if (!was) state[facet].add(value);
  refresh();
}

function listen() {
  get('search').addEventListener('input', (event) => { state.query = event.target.value; refresh(); });
  get('sort').addEventListener('change', (event) => { state.sort = event.target.value; refresh(); });
  get('group').addEventListener('change', (event) => { state.byQuestion = event.target.checked; refresh(); });
  get('clear').addEventListener('click', () => {
    for (const { key } of FACETS) state[key].clear();
    Object.assign(state, { query: '', least: null, most: null });
    get('search').value = '';
    refresh();
  });
  for (const part of document.querySelectorAll('.funnel button')) {
    part.addEventListener('click', () => onlyPart(part.dataset));
  }
  get('filters').addEventListener('click', (event) => { filtering(true); event.stopPropagation(); });
  document.addEventListener('click', ({ target }) => {
    if (target.isConnected && !target.closest('#facets')) filtering(false);  // a filter clicked is drawn anew
  });
  addEventListener('hashchange', () => {
    readAddress();
    pushed = false;
    refresh({ keep: true });
  });
  narrow.addEventListener('change', () => read(false));
  addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === 'Escape') {
      if (document.body.classList.contains('filtering')) filtering(false);
      else if (document.activeElement === get('search')) get('list').focus();
      else if (narrow.matches) close();
      return;
    }
    if (event.target.closest('input:not([type="checkbox"]), select')) return;
    const onList = document.activeElement === get('list');
    const step = { j: 1, k: -1, ArrowDown: onList && 1, ArrowUp: onList && -1 }[event.key];
    if (step) move(step);
    else if (event.key === 'n' || event.key === 'N') reader.step(event.key === 'n' ? 1 : -1);
    else if (event.key === '/') get('search').select();
    else return;
    event.preventDefault();
  });
}

(async () => {
  await load((share) => { get('tally').textContent = `loading, ${Math.round(100 * share)} %`; });
  widest = traces.reduce((most, trace) => Math.max(most, trace.tokens), 0);
  listValues();
  furnish();
  readAddress();
  listen();
  await refresh({ keep: true });
  document.body.dataset.ready = 'true';
})();
