// The traces: read from the page's data, filtered, searched, put in order. Nothing here draws.

const traces = [];
const questions = [];
const byUid = new Map();
const BINS = 24;  // of the histogram of lengths
const SLICE = 12;  // milliseconds of work between two breaths of the page

// What can be filtered by: `of` gives a trace's values. Values of one facet are alternatives, facets add up.
const FACETS = [
  { key: 'verdict', title: 'Verdict', of: (trace) => [trace.verdict] },
  { key: 'status', title: 'Kept', of: (trace) => (trace.status ? [trace.status] : []) },
  { key: 'first', title: 'First reason', of: (trace) => trace.reasons.slice(0, 1) },
  { key: 'reason', title: 'Rejected for', of: (trace) => trace.reasons },
  { key: 'finish', title: 'Ended by', of: (trace) => [trace.finish] },
  { key: 'flag', title: 'Flags', of: (trace) => [...new Set(trace.flags.map((flag) => flag.split(': ')[0]))] },
  { key: 'level', title: 'Level', of: (trace) => (trace.question.level === undefined ? [] : [trace.question.level]) },
];

const breathe = () => new Promise((resolve) => setTimeout(resolve));

/** Read the blocks of rows, one at a time; `progress` is told the share that is done. */
async function load(progress) {
  const blocks = document.querySelectorAll('script.rows');
  let done = 0;
  for (const block of blocks) {
    for (const row of JSON.parse(block.textContent)) {
      if (row.messages) addQuestion(row);
      else addTrace(row);
    }
    block.remove();  // its text is held by the rows now
    done += 1;
    progress(done / blocks.length);
    await breathe();
  }
  for (const question of questions) question.traces.sort((a, b) => a.sample - b.sample || a.order - b.order);
}

function addQuestion(row) {
  const level = row.meta?.level;
  const asked = row.messages.filter(([role]) => role !== 'system').map(([, text]) => text);
  questions.push({
    ...row, number: questions.length, traces: [], right: 0, words: asked.join('\n\n'),
    level: level === undefined ? undefined : String(level),
  });
}

function addTrace(row) {
  const trace = { thought: '', text: '', status: '', reasons: [], flags: [], finish: '', ...row, order: traces.length };
  trace.question = questions[row.q];
  trace.values = FACETS.map((facet) => facet.of(trace));
  trace.question.traces.push(trace);
  trace.question.right += trace.verdict === 'right';
  byUid.set(trace.uid, trace);
  traces.push(trace);
}

/**
 * Return the traces that pass every filter, and for each facet how many would be left for each of its values: traces
 * that pass all filters but that facet's own.
 *
 * filters: a Set of chosen values by facet key, and `least` and `most` tokens (null: no bound).
 * found: which traces a search found, by order; null where nothing is searched.
 */
function select(filters, found, widest) {
  const counts = FACETS.map(() => new Map());
  const bins = new Array(BINS).fill(0);
  const shown = [];
  for (const trace of traces) {
    if (found && !found[trace.order]) continue;
    const { tokens } = trace;
    const fits = tokens >= (filters.least ?? 0) && tokens <= (filters.most ?? Infinity);
    let misses = fits ? 0 : 1;
    let missed = fits ? -1 : BINS;  // the facet that lets it down; lengths count as one
    for (let i = 0; i < FACETS.length && misses < 2; i++) {
      const wanted = filters[FACETS[i].key];
      if (wanted.size && !trace.values[i].some((value) => wanted.has(value))) {
        misses += 1;
        missed = i;
      }
    }
    if (misses > 1) continue;
    if (!misses) shown.push(trace);
    if (!misses || missed === BINS) bins[Math.min(BINS - 1, Math.floor((tokens / (widest + 1)) * BINS))] += 1;
    for (let i = 0; i < FACETS.length; i++) {
      if (misses && missed !== i) continue;
      for (const value of trace.values[i]) counts[i].set(value, (counts[i].get(value) ?? 0) + 1);
    }
  }
  return { shown, counts, bins };
}

/** Return the expression that finds a query as it is typed: letters in either case, any white space for a space. */
function pattern(query, flags = 'iu') {
  const words = query.trim();
  if (!words) return null;
  return new RegExp(words.replace(/[\\^$.*+?()[\]{}|]/g, '\\$&').replace(/\s+/g, '\\s+'), flags);
}

/**
 * Return which traces have a query in question, completion, gold, predicted answer or uid, by order; null if
 * `overtaken` says meanwhile that nobody waits any more. The work is cut in slices: typing and scrolling go on.
 *
 * within: the result for a part of the same query, which narrows the search; null for all.
 */
async function search(query, within, overtaken, progress) {
  const wanted = pattern(query);
  const found = new Uint8Array(traces.length);
  const asked = new Array(questions.length);
  let until = performance.now() + SLICE;
  for (const trace of traces) {
    if (performance.now() > until) {
      progress(trace.order / traces.length);
      await breathe();
      if (overtaken()) return null;
      until = performance.now() + SLICE;
    }
    if (within && !within[trace.order]) continue;
    const question = (asked[trace.question.number] ??= wanted.test(trace.question.words));
    found[trace.order] = question || wanted.test(trace.thought) || wanted.test(trace.text)
      || wanted.test(trace.predicted ?? '') || wanted.test(trace.gold ?? '') || wanted.test(trace.uid);
  }
  return found;
}

const ORDERS = {
  order: (a, b) => a.order - b.order,
  shortest: (a, b) => a.tokens - b.tokens || a.order - b.order,
  longest: (a, b) => b.tokens - a.tokens || a.order - b.order,
  hardest: (a, b) => a.question.right / a.question.traces.length - b.question.right / b.question.traces.length
    || a.question.number - b.question.number || a.sample - b.sample,
};

/** Return the list's items: traces in order, or under their questions, which stand in the order of their first one. */
function arrange(shown, sort, byQuestion) {
  const sorted = [...shown].sort(ORDERS[sort]);
  if (!byQuestion) return sorted.map((trace) => ({ kind: 'trace', trace }));
  const groups = new Map();
  for (const trace of sorted) {
    if (!groups.has(trace.question)) groups.set(trace.question, []);
    groups.get(trace.question).push(trace);
  }
  const items = [];
  for (const [question, members] of groups) {
    if (sort === 'order') members.sort((a, b) => a.sample - b.sample);
    items.push({ kind: 'head', question, shown: members.length });
    for (const trace of members) items.push({ kind: 'sample', trace });
  }
  return items;
}
