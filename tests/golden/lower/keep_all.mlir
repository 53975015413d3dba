builtin.module {
  kv.policy @keep_all digest "57ee8a461c2a2f43" {
    %0 = kv.region "all" loc("library/keep_all.kvp":3:10)
    %1 = kv.union %0 loc("library/keep_all.kvp":3:10)
    kv.class @all loc("library/keep_all.kvp":3:5)
    kv.keep %1 for @all at [] loc("library/keep_all.kvp":3:5)
  } loc("library/keep_all.kvp":2:1)
} loc(unknown)
