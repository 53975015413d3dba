builtin.module {
  kv.policy @set_prompting digest "a8b56e87c84423e7" {
    %0 = kv.region "all" loc("library/set_prompting.kvp":2:1)
    %1 = kv.union %0 loc("library/set_prompting.kvp":2:1)
    kv.class @all loc("library/set_prompting.kvp":2:1)
    kv.keep %1 for @all at [] loc("library/set_prompting.kvp":2:1)
    %2 = kv.region "span" span "self" loc("library/set_prompting.kvp":3:12)
    %3 = kv.region "span" span "prefix" loc("library/set_prompting.kvp":3:27)
    %4 = kv.union %2, %3 loc("library/set_prompting.kvp":3:12)
    kv.readers @"reads all" loc("library/set_prompting.kvp":3:5)
    kv.attend %4 for @"reads all" at [] loc("library/set_prompting.kvp":3:5)
  } loc("library/set_prompting.kvp":2:1)
} loc(unknown)
