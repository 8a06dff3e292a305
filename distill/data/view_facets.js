// The filters: what can be chosen, how many traces would be left, and how long they are.

const LONG = 8;  // values of a facet shown before "more"
const expanded = new Set();  // facets all of whose values are shown
const facetValues = new Map();  // of all traces, the most frequent first: rows keep their place while counts change

function drawFacets(counts, bins) {
  const box = get('values');
  const focus = document.activeElement?.closest('#values button')?.dataset;
  box.replaceChildren(...FACETS.map((facet, i) => drawFacet(facet, counts[i])).filter(Boolean));
  const same = (each) => each.dataset.facet === focus.facet && each.dataset.value === focus.value;
  if (focus) [...box.querySelectorAll('button')].find(same)?.focus();
  drawBins(bins);
}

function drawFacet({ key, title }, numbers) {
  const all = facetValues.get(key);
  const values = [...all, ...[...state[key]].filter((value) => !all.includes(value))];
  if (!values.length || key === 'first') return null;  // the funnel at the top is the first reasons' own
  const frame = make('fieldset', 'facet', make('legend', '', title));
  const short = values.length > LONG + 1 && !expanded.has(key);
  for (const value of short ? values.filter((each, i) => i < LONG || state[key].has(each)) : values) {
    const number = numbers.get(value) ?? 0;
    const row = make('button', number ? '' : 'none');
    row.append(make('span', '', word(key, value)), make('span', '', count(number)));
    row.type = 'button';
    row.dataset.facet = key;
    row.dataset.value = value;
    row.setAttribute('aria-pressed', state[key].has(value));
    row.addEventListener('click', () => toggle(key, value));
    frame.append(row);
  }
  if (short) {
    const more = make('button', 'more', make('span', '', `${count(values.length - LONG)} more`));
    more.type = 'button';
    more.addEventListener('click', () => { expanded.add(key); refresh({ keep: true }); });
    frame.append(more);
  }
  return frame;
}

function listValues() {
  const nothing = Object.fromEntries(FACETS.map(({ key }) => [key, new Set()]));
  const { counts } = select({ ...nothing, least: null, most: null }, null, widest);
  FACETS.forEach(({ key }, i) => {
    const values = [...counts[i]].sort((a, b) => b[1] - a[1]).map(([value]) => value);
    if (key === 'level') values.sort((a, b) => a.localeCompare(b, 'en', { numeric: true }));
    facetValues.set(key, values);
  });
}

/** Make what stays while the values are drawn anew: a slider that is made anew loses the focus, and the pointer. */
function furnish() {
  const frame = make('fieldset', 'facet lengths', make('legend', '', 'Tokens'), make('div', 'bins'));
  const between = make('div', 'between');
  for (const [name, label] of [['least', 'Fewest tokens'], ['most', 'Most tokens']]) {
    const slider = make('input', name);
    Object.assign(slider, { type: 'range', min: 0, max: widest, step: 1 });
    slider.setAttribute('aria-label', label);
    slider.addEventListener('input', () => slide(name, Number(slider.value)));
    between.append(slider);
  }
  frame.append(between, make('output'));
  const hints = make('p', 'hints');
  for (const [key, what] of [['j', 'next'], ['k', 'previous'], ['/', 'search'], ['n', 'next match']]) {
    hints.append(make('span', '', make('kbd', '', key), ` ${what}`));
  }
  const values = make('div');
  values.id = 'values';
  get('facets').append(make('div', 'done', button('Done', () => filtering(false))), values, frame, hints);
}

/** Take a new bound of the length; the two do not pass each other. */
function slide(name, value) {
  const at = name === 'least' ? Math.min(value, state.most ?? widest) : Math.max(value, state.least ?? 0);
  state[name] = at === (name === 'least' ? 0 : widest) ? null : at;
  refresh();
}

function drawBins(bins) {
  const frame = get('facets').querySelector('.lengths');
  const [least, most] = [state.least ?? 0, state.most ?? widest];
  const tallest = Math.max(1, ...bins);
  frame.querySelector('.bins').replaceChildren(...bins.map((number, i) => {
    const from = (i / BINS) * (widest + 1);
    const to = ((i + 1) / BINS) * (widest + 1);
    const bar = make('i', to <= least || from > most ? 'out' : '');
    bar.style.height = `${number ? Math.max(2, (100 * number) / tallest) : 0}%`;
    bar.title = `${count(Math.ceil(from))} to ${count(Math.ceil(to) - 1)} tokens: ${count(number)}`;
    return bar;
  }));
  frame.querySelector('.least').value = least;
  frame.querySelector('.least').style.zIndex = least > widest / 2 ? 1 : 0;  // to be had where both are at the right end
  frame.querySelector('.most').value = most;
  frame.querySelector('output').textContent = `${count(least)} to ${count(most)} tokens`;
}

/** Lay the filters over a narrow window, or take them away. */
function filtering(on) {
  document.body.classList.toggle('filtering', on);
  get('filters').setAttribute('aria-expanded', on);
}
