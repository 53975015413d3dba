builtin.module {
  kv.policy @graph_kv digest "a45287940bf60dc3" {
    %0 = kv.region "all" loc("library/graph_kv.kvp":3:1)
    %1 = kv.union %0 loc("library/graph_kv.kvp":3:1)
    kv.class @all loc("library/graph_kv.kvp":3:1)
    kv.keep %1 for @all at [] loc("library/graph_kv.kvp":3:1)
    %2 = kv.region "span" span "self" loc("library/graph_kv.kvp":4:12)
    %3 = kv.region "span" span "sources" loc("library/graph_kv.kvp":4:27)
    %4 = kv.union %2, %3 loc("library/graph_kv.kvp":4:12)
    kv.readers @"reads all" loc("library/graph_kv.kvp":4:5)
    kv.attend %4 for @"reads all" at [] loc("library/graph_kv.kvp":4:5)
  } loc("library/graph_kv.kvp":3:1)
} loc(unknown)
