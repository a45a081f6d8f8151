"""Any model of transformers with any cache method, through transformers' public extension points."""
